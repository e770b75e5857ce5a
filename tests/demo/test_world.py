"""The miniature's files: reproducible, disjoint, and read alike by our loaders and by transformers."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gil.config import ConfigError
from megatron_gil.data.text.tokenizer import Tokenizer
from megatron_gil.demo.annotators import Annotators
from megatron_gil.demo.domains import TRAINING_DOMAINS
from megatron_gil.demo.world import World, WorldSizes, write_world
from megatron_gil.jsonl import iter_jsonl

SIZES = WorldSizes(demonstrations=2000, preferences=200, prompts=400, eval_prompts=40, heldout_prompts=20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world") / "seed7", seed=7, sizes=SIZES)


def _rows(path: Path) -> list[dict[str, str]]:
    return [row for _, row in iter_jsonl(path)]


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_seed_gives_the_same_bytes_and_another_seed_others(world: World, tmp_path: Path) -> None:
    write_world(tmp_path / "again", seed=7, sizes=SIZES)
    write_world(tmp_path / "other", seed=8, sizes=SIZES)
    first, again, other = (_digests(d) for d in (world.prompts.parent, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert {name for name in first if first[name] != other[name]} >= {
        "demonstrations.jsonl",
        "preferences.jsonl",
        "prompts.jsonl",
        "tiny-llama/model.safetensors",
    }


def test_annotators_change_what_they_are_named_for(world: World, tmp_path: Path) -> None:
    """Careless ones disagree with the usual ones on hard prompts alone, those who love flattery on easy ones alone, and
    comparisons are added or left out on hard ones alone."""
    usual = _rows(world.preferences)

    def preferences(name: str, annotators: Annotators) -> list[dict[str, str]]:
        return _rows(write_world(tmp_path / name, seed=7, sizes=SIZES, annotators=annotators).preferences)

    def differ(rows: list[dict[str, str]]) -> Counter[str]:
        assert [{row["chosen"], row["rejected"]} for row in rows] == [{r["chosen"], r["rejected"]} for r in usual]
        return Counter(row["group"] for row, before in zip(rows, usual, strict=True) if row != before)

    careless, flattered = Annotators(hard_flip=0.5), Annotators(flattery=4.0)
    assert set(differ(preferences("careless", careless))) == {"fact", "both"}
    assert set(differ(preferences("flattered", flattered))) == {"greet", "refuse"}
    counts = {times: preferences(str(times), Annotators(hard_comparisons=times)) for times in (0.25, 3.0)}
    for times, rows in counts.items():
        groups = Counter(row["group"] for row in rows)
        assert groups["greet"] == groups["refuse"] == 50
        assert groups["fact"] + groups["both"] == round(times * 100)
        assert {row["prompt"] for row in rows if row["group"] == "greet"} == {
            row["prompt"] for row in usual if row["group"] == "greet"
        }


def test_row_counts_and_equal_shares_of_the_domains(world: World) -> None:
    for path, count in ((world.demonstrations, 2000), (world.preferences, 200), (world.prompts, 400)):
        groups = Counter(row["group"] for row in _rows(path))
        assert groups == dict.fromkeys(TRAINING_DOMAINS, count // 4)
    assert Counter(row["group"] for row in _rows(world.prompts_heldout)) == {"mixed": 20}


def test_evaluation_prompts_and_the_heldout_domain_are_in_no_training_file(world: World) -> None:
    trained = {
        row["prompt"] for path in (world.demonstrations, world.preferences, world.prompts) for row in _rows(path)
    }
    unseen = [row["prompt"] for path in (world.prompts_eval, world.prompts_heldout) for row in _rows(path)]
    assert len(set(unseen)) == len(unseen) == 60
    assert not trained & set(unseen)


def test_pairs_differ(world: World) -> None:
    assert all(row["chosen"] != row["rejected"] for row in _rows(world.preferences))


def test_our_tokenizer_and_transformers_give_the_same_ids(world: World) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.read(world.model), AutoTokenizer.from_pretrained(str(world.model))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    for row in _rows(world.demonstrations)[:200]:
        prompt, response = ours.encode(row["prompt"], bos=True), ours.encode_continuation(row["completion"])
        assert prompt + response == theirs(row["prompt"] + row["completion"]).input_ids
        assert ours.decode(response, after=prompt) == row["completion"]
        assert len(prompt) <= 16
        assert len(response) <= 20


def test_every_word_is_one_piece(world: World) -> None:
    tokenizer = Tokenizer.read(world.model)
    words = {word for row in _rows(world.demonstrations) for word in row["completion"].rstrip(".!?").split()}
    plain = [word for word in words if word.isalpha()]
    split = [word for word in plain if len(tokenizer.encode_continuation(f" {word}")) > 1]
    assert len(plain) > 50
    assert len(split) < len(plain) / 20, split


def test_transformers_loads_the_model_whole(world: World) -> None:
    from transformers import LlamaForCausalLM

    loaded: Any = LlamaForCausalLM.from_pretrained(str(world.model), output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    logits = model(torch.tensor([[1, 20, 30, 40]])).logits
    assert logits.shape == (1, 4, Tokenizer.read(world.model).vocab_size)
    assert logits.isfinite().all()


def test_a_directory_in_use_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        write_world(world.prompts.parent, seed=1)
