"""Everything a directory can be wrong in: one line that names it, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_gil.config import ConfigError, ScoreConfig, SftConfig
from megatron_gil.config.files import load_config
from megatron_gil.models.convert.copy import export_model, import_model
from megatron_gil.training.check_run import check_run
from tests.convert.directories import copy_as, edit_config, files_under, read_tensors, write_tensors
from tests.models.tiny import FAMILIES

LIMITS = ("data.max_tokens=60", "data.max_prompt_tokens=30")  # the models have 64 positions
QUERY = "model.layers.1.self_attn.q_proj.weight"


def _refusal(source: Path, tmp_path: Path) -> str:
    """The message of the import, after a look at what it left."""
    before = files_under(tmp_path)
    with pytest.raises(ConfigError) as raised:
        import_model(source, tmp_path / "out" / "imported")
    assert files_under(tmp_path) == before
    message = str(raised.value)
    assert "\n" not in message
    return message


CONFIGS = {
    "gemma": ({"model_type": "gemma3", "architectures": ["Gemma3ForCausalLM"]}, ["model_type", "'gemma3'", "'llama'"]),
    "another family": ({"model_type": "qwen3"}, ["architectures", "'LlamaForCausalLM'", "Qwen3ForCausalLM"]),
    "no bias": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        ["no tensor model.layers.0.self_attn.q_proj.bias", "[32]"],
    ),
    "mixture": ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, ["'mixtral'", "'llama'"]),
    "architecture": ({"architectures": ["LlamaMoEForCausalLM"]}, ["'LlamaMoEForCausalLM'", "LlamaForCausalLM"]),
    "linear rope": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type", "'linear'", "'llama3'"]),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, ["rope_type", "'yarn'", "'default'"]),
    "bias": ({"attention_bias": True}, ["attention_bias", "True"]),
    "heads": ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
    "text for a flag": ({"tie_word_embeddings": "false"}, ["tie_word_embeddings", "'false'", "true or false"]),
    "other vocabulary": (
        {"vocab_size": 62},
        ["model.embed_tokens.weight", "[61, 32]", "[62, 32]", "model.safetensors"],
    ),
    "more layers": ({"num_hidden_layers": 3}, ["no tensor model.layers.2.input_layernorm.weight", "[32]"]),
    "fewer layers": ({"num_hidden_layers": 1}, ["model.layers.1.", "not expected"]),
    "no such head": ({"architectures": ["LlamaForSequenceClassification"]}, ["no tensor score.weight", "[1, 32]"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(world: Path, tmp_path: Path, name: str) -> None:
    changes, parts = CONFIGS[name]
    source = copy_as(world / "policy", tmp_path / "source")
    edit_config(source, **changes)
    message = _refusal(source, tmp_path)
    assert all(part in message for part in [str(source), *parts]), message


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", "\ufeff{}"])
def test_config_texts_that_break_parsers(world: Path, tmp_path: Path, text: str) -> None:
    source = copy_as(world / "policy", tmp_path / "source")
    (source / "config.json").write_text(text)
    assert str(source) in _refusal(source, tmp_path)


def _remove_tensor(source: Path) -> None:
    tensors = read_tensors(source)
    del tensors[QUERY]
    write_tensors(source, tensors)


def _transpose(source: Path) -> None:
    tensors = read_tensors(source)
    name = "model.layers.0.mlp.up_proj.weight"
    write_tensors(source, {**tensors, name: tensors[name].T.contiguous()})


def _store_as_integers(source: Path) -> None:
    tensors = read_tensors(source)
    write_tensors(source, {**tensors, QUERY: tensors[QUERY].to(torch.int8)})


def _add_bias(source: Path) -> None:
    write_tensors(source, {**read_tensors(source), "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})


def _truncate(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")


def _untie_silently(source: Path) -> None:
    edit_config(source, tie_word_embeddings=True)


FILES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing tensor": (_remove_tensor, [f"no tensor {QUERY}", "[32, 32]"]),
    "wrong shape": (_transpose, ["model.safetensors", "mlp.up_proj.weight", "[32, 48]", "expected [48, 32]"]),
    "integers": (_store_as_integers, ["model.safetensors", QUERY, "I8", "F32, BF16 or F16"]),
    "unknown tensor": (_add_bias, ["model.safetensors", "q_proj.bias", "not expected"]),
    "truncated": (_truncate, ["model.safetensors", "cut off"]),
    "too long": (_lengthen, ["model.safetensors", "cut off or not a safetensors file"]),
    "empty file": (lambda d: (d / "model.safetensors").write_bytes(b""), ["model.safetensors", "cut off"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["no model.safetensors"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json: cannot be read"]),
    "broken config": (lambda d: (d / "config.json").write_text("{"), ["config.json: not valid JSON"]),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), ["neither tokenizer.json nor tokenizer.model"]),
    "other head": (_untie_silently, ["model.safetensors", "lm_head.weight", "tie_word_embeddings"]),
    "directory": (lambda d: shutil.rmtree(d), ["config.json: cannot be read: No such file"]),
}


@pytest.mark.parametrize("name", FILES)
def test_files(world: Path, tmp_path: Path, name: str) -> None:
    damage, parts = FILES[name]
    source = copy_as(world / "policy", tmp_path / "source")
    damage(source)
    message = _refusal(source, tmp_path)
    assert all(part in message for part in [str(source), *parts]), message


def _edit_score(source: Path, **tensors: torch.Tensor) -> None:
    write_tensors(source, {**read_tensors(source), **{f"score.{name}": tensor for name, tensor in tensors.items()}})


@pytest.mark.parametrize("name", ["reward_model", *(f"{family}_reward" for family in FAMILIES)])
@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({"weight": torch.zeros(5, 32)}, ["score.weight gives 5 labels, expected 1", "num_labels"]),
        ({"bias": torch.ones(1)}, ["score.bias", "ForSequenceClassification", "moves all scores alike"]),
        ({"weight": torch.zeros(1, 31)}, ["score.weight has shape [1, 31], expected [1, 32]"]),
    ],
    ids=["labels", "bias", "shape"],
)
def test_another_score_head(
    world: Path, tmp_path: Path, name: str, tensors: dict[str, torch.Tensor], parts: list[str]
) -> None:
    """A run says the same as the import."""
    source = copy_as(world / name, tmp_path / "source")
    _edit_score(source, **tensors)
    message = _refusal(source, tmp_path)
    assert all(part in message for part in [str(source), *parts]), message
    arguments = [f"models.reward_model={source}", f"data.train={world / 'preferences.jsonl'}", "output=scores.jsonl"]
    with pytest.raises(ConfigError) as raised:
        check_run(load_config(ScoreConfig, None, arguments), 1)
    assert str(raised.value) == message


def test_a_tied_head_that_is_another_is_refused_by_a_run_too(world: Path, tmp_path: Path) -> None:
    """transformers 5 computes with the head that is there."""
    source = copy_as(world / "tied", tmp_path / "source")
    tensors = read_tensors(source)
    arguments = [f"models.policy={source}", f"data.train={world / 'demonstrations.jsonl'}", "run.dir=run", *LIMITS]
    write_tensors(source, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    check_run(load_config(SftConfig, None, arguments), 1)
    write_tensors(source, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    message = _refusal(source, tmp_path)
    assert all(part in message for part in [str(source), "lm_head.weight", "tie_word_embeddings"]), message
    with pytest.raises(ConfigError) as raised:
        check_run(load_config(SftConfig, None, arguments), 1)
    assert str(raised.value) == message


def test_a_head_of_another_name(world: Path, tmp_path: Path) -> None:
    source = copy_as(world / "policy", tmp_path / "source")
    write_tensors(source, {**read_tensors(source), "v_head.summary.weight": torch.zeros(1, 32)})
    assert "tensor v_head.summary.weight is not expected in a Llama" in _refusal(source, tmp_path)
    arguments = [f"models.reward_model={source}", f"data.train={world / 'preferences.jsonl'}", "output=scores.jsonl"]
    with pytest.raises(ConfigError, match=r"no score\.weight, and its v_head\.summary\.weight is no head"):
        check_run(load_config(ScoreConfig, None, arguments), 1)


SECOND = "model-00002-of-00003.safetensors"
SHARDS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing shard": (lambda d: (d / SECOND).unlink(), [f"{SECOND}: not found"]),
    "truncated shard": (lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-3]), [SECOND, "cut off"]),
    "missing shard, no index": (
        lambda d: [(d / SECOND).unlink(), (d / "model.safetensors.index.json").unlink()],
        ["file 2 of 3 is missing"],
    ),
    "two sets": (
        lambda d: [
            (d / "model.safetensors.index.json").unlink(),
            shutil.copyfile(d / SECOND, d / "model-00002-of-00004.safetensors"),
        ],
        ["of 4 is missing"],
    ),
    "a tensor twice": (
        lambda d: shutil.copyfile(d / "model-00001-of-00003.safetensors", d / SECOND),
        [SECOND, "is in model-00001-of-00003.safetensors too"],
    ),
    "index": (lambda d: (d / "model.safetensors.index.json").write_text("[]"), ["index.json", "weight_map"]),
    "outside": (
        lambda d: (d / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "../x.safetensors"}})
        ),
        ["index.json", "'../x.safetensors'", "beside the index"],
    ),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards(world: Path, tmp_path: Path, name: str) -> None:
    damage, parts = SHARDS[name]
    source = copy_as(world / "policy", tmp_path / "source", form="index")
    damage(source)
    message = _refusal(source, tmp_path)
    assert all(part in message for part in [str(source), *parts]), message


def test_nothing_is_overwritten(world: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for convert in (import_model, lambda a, b: export_model(a, b, note=pytest.fail)):
        with pytest.raises(ConfigError, match="there exists already"):
            convert(world / "policy", tmp_path / "there")
    assert files_under(tmp_path / "there") == []


def test_a_number_too_large_for_float16_is_named(world: Path, tmp_path: Path) -> None:
    source = copy_as(world / "policy", tmp_path / "source")
    tensors = read_tensors(source)
    tensors[QUERY][3, 4] = 1e5
    write_tensors(source, tensors)
    with pytest.raises(ConfigError, match=rf"model\.safetensors: tensor {QUERY} .* F16"):
        import_model(source, tmp_path / "imported", dtype="float16")
    assert files_under(tmp_path) == ["source"]


def test_a_full_disk_is_seen_before_anything_is_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match="GiB are free"):
        import_model(world / "policy", tmp_path / "imported")
    assert files_under(tmp_path) == []


def test_the_wrong_role_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json.*language-model head, not a reward"):
        export_model(world / "policy", tmp_path / "out", role="reward", note=pytest.fail)
    with pytest.raises(ConfigError, match=r"config\.json.*score head, not a policy"):
        export_model(world / "reward_model", tmp_path / "out", role="policy", note=pytest.fail)
