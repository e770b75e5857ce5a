"""Export from what training wrote under a layout: a run, a checkpoint, a model's directory; heads and scores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from megatron_gil.config import CheckpointSection, ConfigError, OptimizerSection
from megatron_gil.engine.checkpoint import CheckpointStore
from megatron_gil.engine.files import digest, write_manifest
from megatron_gil.engine.megatron import MegatronModel, TrainableModel
from megatron_gil.models.convert.copy import export_model, import_model
from megatron_gil.models.families import read_spec
from megatron_gil.types import TokenBatch
from tests.convert.directories import assert_equal_bits, files_under, read_tensors
from tests.models.running import parallel
from tests.models.tiny import FAMILIES
from tests.ranks import run_ranks

HEADS: dict[str, Any] = {"policy": "lm", "reward_model": "score", "critic": "critic"}
LENGTHS = (5, 9, 12)


def _batch() -> TokenBatch:
    """Rows that end in an end-of-sequence token (2) and hold it before; the padding token is 3."""
    tokens = torch.randint(4, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(LENGTHS):
        tokens[row, length - 3], tokens[row, length - 1], tokens[row, length:] = 2, 2, 3
    return TokenBatch(
        tokens=tokens,
        lengths=torch.tensor(LENGTHS),
        response_mask=torch.ones(3, 11, dtype=torch.bool),
        row_ids=torch.arange(3),
    )


def _save(layout: dict[str, Any], world: Path, run: Path) -> Tensor:
    """A checkpoint of the three models at iteration 2; the reward model's scores."""
    with parallel(layout) as started:
        models = {}
        for role, head in HEADS.items():
            source = world / ("policy" if head == "lm" else "reward_model")
            models[role] = TrainableModel(
                read_spec(source),
                started,
                head=head,
                num_groups=2 if head == "critic" else 0,
                micro_size=1,
                optimizer=OptimizerSection(),
            )
            models[role].load(source)
        store = CheckpointStore(run / "checkpoints", started, CheckpointSection(), tokenizer_dir=world / "policy")
        store.save(2, models, {})
        frozen = MegatronModel(models["reward_model"].spec, started, head="score", micro_size=3)
        frozen.load(run / "checkpoints/iter_0000002/reward_model")
        return frozen.evaluate(_batch()).scores


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    run = tmp_path_factory.mktemp("trained") / "run"
    (run / "checkpoints").mkdir(parents=True)
    layout = {"tensor_size": 2, "pipeline_size": 1}
    scores = run_ranks(_save, 2, layout, world, run)[0]
    shutil.copytree(run / "checkpoints/iter_0000002", run / "checkpoints/iter_0000001")
    return run, scores


@pytest.mark.parametrize("where", ["", "checkpoints/iter_0000001", "checkpoints/iter_0000001/{role}"])
@pytest.mark.parametrize(("role", "name"), [("policy", "policy"), ("reward", "reward_model"), ("critic", "critic")])
def test_what_was_imported_comes_out_of_training_unchanged(
    world: Path, trained: tuple[Path, Tensor], tmp_path: Path, role: Any, name: str, where: str
) -> None:
    export_model(trained[0] / where.format(role=name), tmp_path / "out", role=role, note=pytest.fail)
    source = world / ("policy" if role == "policy" else "reward_model")
    assert_equal_bits(read_tensors(tmp_path / "out"), read_tensors(source))
    assert {"config.json", "tokenizer.model"} <= set(files_under(tmp_path / "out"))


@pytest.mark.parametrize("role", ["reward", "critic"])
def test_transformers_gives_the_same_scores(trained: tuple[Path, Tensor], tmp_path: Path, role: Any) -> None:
    """The critic has the reward model's weights and the group classifier's besides, which is left out."""
    assert "group_head.weight" in read_tensors(trained[0] / "checkpoints/iter_0000002/critic")
    export_model(trained[0], tmp_path / "out", role=role, note=pytest.fail)
    loaded: Any = LlamaForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    batch = _batch()
    mask = torch.arange(12) < batch.lengths[:, None]
    with torch.no_grad():
        scores = model(batch.tokens, attention_mask=mask.long()).logits[:, 0]
    assert trained[1].std() > 0.05, "scores too alike to tell positions apart"
    torch.testing.assert_close(scores, trained[1], atol=1e-6, rtol=1e-5)  # float32 sums in another order


def _save_families(layout: dict[str, Any], world: Path, run: Path) -> None:
    with parallel(layout) as started:
        for name in FAMILIES:
            models = {}
            for role, head, source in (("policy", "lm", name), ("reward_model", "score", f"{name}_reward")):
                spec: Any = read_spec(world / source)
                models[role] = TrainableModel(spec, started, head=head, micro_size=1, optimizer=OptimizerSection())
                models[role].load(world / source)
            directory = run / name / "checkpoints"
            CheckpointStore(directory, started, CheckpointSection(), tokenizer_dir=world / name).save(1, models, {})


def test_every_family_comes_back_from_a_checkpoint(world: Path, tmp_path: Path) -> None:
    for name in FAMILIES:
        (tmp_path / name).mkdir()
    run_ranks(_save_families, 4, {"tensor_size": 2, "pipeline_size": 2}, world, tmp_path)
    kinds: dict[str, Any] = {"policy": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}
    for name in FAMILIES:
        for role, source in (("policy", name), ("reward", f"{name}_reward")):
            target = tmp_path / f"{source}_out"
            export_model(tmp_path / name, target, role=role, note=pytest.fail)  # type: ignore[arg-type]
            assert_equal_bits(read_tensors(target), read_tensors(world / source))
            assert read_spec(target) == read_spec(world / source)
            theirs, report = kinds[role].from_pretrained(target, output_loading_info=True)
            assert not any(report.values()), report
            before = kinds[role].from_pretrained(world / source)
            tokens = _batch().tokens
            with torch.no_grad():
                assert torch.equal(theirs(tokens).logits, before(tokens).logits), "config.json says something else"


def test_the_policy_is_taken_where_no_role_is_named(trained: tuple[Path, Tensor], tmp_path: Path) -> None:
    export_model(trained[0], tmp_path / "out", role=None, note=pytest.fail)
    LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_an_exported_reward_model_is_imported_again(trained: tuple[Path, Tensor], tmp_path: Path) -> None:
    export_model(trained[0], tmp_path / "out", role="reward", note=pytest.fail)
    import_model(tmp_path / "out", tmp_path / "again")
    assert_equal_bits(read_tensors(tmp_path / "again"), read_tensors(tmp_path / "out"))


def _flip_a_byte(path: Path, where: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Any] = {
    "a byte": (lambda d: _flip_a_byte(next(d.glob("policy/*2.safetensors"))), "of-00002.safetensors differs"),
    "a header": (lambda d: _flip_a_byte(next(d.glob("policy/*00001-of*")), 9), "00001-of-00002.safetensors differs"),
    "a length": (lambda d: (d / "policy/config.json").write_text("{}"), "policy/config.json is missing or not of"),
    "a file": (lambda d: (d / "policy/tokenizer.model").unlink(), "policy/tokenizer.model is missing"),
    "the manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing or unreadable"),
    "a broken manifest": (lambda d: (d / "manifest.json").write_text("[3]"), "manifest.json is missing or unreadable"),
    "an empty manifest": (lambda d: (d / "manifest.json").write_text("{}"), "lists no files of policy"),
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, None) for name in DAMAGE), ("a byte", "float32")])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    world: Path, trained: tuple[Path, Tensor], tmp_path: Path, name: str, dtype: str | None
) -> None:
    """What is damaged in the weights is found while they are copied, and leaves nothing."""
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    damage, part = DAMAGE[name]
    damage(run / "checkpoints/iter_0000002")
    notes: list[str] = []
    export_model(run, tmp_path / "out", role="policy", dtype=dtype, note=notes.append)
    assert_equal_bits(read_tensors(tmp_path / "out"), read_tensors(world / "policy"))
    assert [part in note and "iter_0000002" in note for note in notes] == [True]
    with pytest.raises(ConfigError, match=r"iter_0000002: .*; take another checkpoint"):
        export_model(run / "checkpoints/iter_0000002", tmp_path / "other", role="policy", note=pytest.fail)
    shutil.rmtree(run / "checkpoints/iter_0000001")
    with pytest.raises(ConfigError, match=r"none of its 1 checkpoint\(s\) is whole"):
        export_model(run, tmp_path / "other", role="policy", note=notes.append)
    assert files_under(tmp_path) == ["out", "run"]


def test_a_file_without_tensors_to_copy_is_proven_too(trained: tuple[Path, Tensor], tmp_path: Path) -> None:
    """Of the critic's files the one that holds nothing but the group classifier, which stays behind."""
    checkpoint = tmp_path / "iter_0000002"
    shutil.copytree(trained[0] / "checkpoints/iter_0000002", checkpoint)
    path = checkpoint / "critic/model-00003-of-00003.safetensors"
    save_file({"group_head.weight": read_tensors(checkpoint / "critic")["group_head.weight"]}, path)
    for held in sorted(checkpoint.glob("critic/model-*-of-00002.safetensors")):
        tensors = {name: tensor for name, tensor in load_file(held).items() if name != "group_head.weight"}
        save_file(tensors, held.with_name(held.name.replace("of-00002", "of-00003")), metadata={"format": "pt"})
        held.unlink()
    (checkpoint / "critic/model.safetensors.index.json").unlink()
    manifest = {str(p.relative_to(checkpoint)): digest(p) for p in checkpoint.glob("critic/*")}
    write_manifest(checkpoint, manifest)
    export_model(checkpoint, tmp_path / "out", role="critic", note=pytest.fail)
    _flip_a_byte(path)
    with pytest.raises(ConfigError, match=r"critic/model-00003-of-00003.safetensors differs from its checksum"):
        export_model(checkpoint, tmp_path / "other", role="critic", note=pytest.fail)
    assert not (tmp_path / "other").exists()


def test_a_role_that_is_not_there_is_named_with_those_that_are(trained: tuple[Path, Tensor], tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_0000007"
    shutil.copytree(trained[0] / "checkpoints/iter_0000002", checkpoint)
    shutil.rmtree(checkpoint / "critic")
    with pytest.raises(ConfigError, match=r"holds no critic, only policy, reward_model; name another --role"):
        export_model(checkpoint, tmp_path / "out", role="critic", note=pytest.fail)
    with pytest.raises(ConfigError, match=r"neither config\.json nor checkpoints"):
        export_model(tmp_path, tmp_path / "out", role=None, note=pytest.fail)
