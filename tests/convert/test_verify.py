"""verify under several layouts, and on two models that differ."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gil.config import ConfigError
from megatron_gil.engine.verify import verify
from megatron_gil.models.convert.copy import import_model
from tests.convert.directories import copy_as, read_tensors, write_tensors
from tests.models.tiny import FAMILIES
from tests.ranks import run_ranks

DEFAULTS: dict[str, Any] = {
    "role": None,
    "tolerance": 1e-5,  # float32; logits of 2 to 4
    "prompts": ["the sun on stone", "é\n"],
    "tensor_size": 1,
    "pipeline_size": 1,
    "allow_bin": False,
}


def _verify(hf_dir: Path, ckpt_dir: Path, options: dict[str, Any]) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = verify(hf_dir, ckpt_dir, note=pytest.fail, **{**DEFAULTS, **options})
    return code, printed.getvalue()


@pytest.mark.parametrize(("tensor_size", "pipeline_size"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("name", ["policy", "reward_model", *FAMILIES, "qwen3_reward"])
def test_equal_models(world: Path, tmp_path: Path, name: str, tensor_size: int, pipeline_size: int) -> None:
    """The vocabulary of 61 is padded at tensor_size 2; the comparison is of all 61 and no more."""
    import_model(world / name, tmp_path / "imported")
    options = {"tensor_size": tensor_size, "pipeline_size": pipeline_size}
    ranks = run_ranks(_verify, tensor_size * pipeline_size, world / name, tmp_path / "imported", options)
    assert [code for code, _ in ranks] == [0] * len(ranks)
    assert "top-1 agreement 100.00%" in ranks[0][1]
    assert ranks[0][1].endswith("tolerance 1e-05: ok\n")
    assert all(text == "" for _, text in ranks[1:])


def test_different_models(world: Path, tmp_path: Path) -> None:
    """One weight of the last layer is off by 0.01, too little to be seen in a text."""
    changed = copy_as(world / "policy", tmp_path / "changed")
    tensors = read_tensors(changed)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 0.01
    write_tensors(changed, tensors)
    code, text = run_ranks(_verify, 1, world / "policy", changed, {})[0]
    assert code == 1
    assert "EXCEEDED" in text
    assert run_ranks(_verify, 1, world / "policy", changed, {"tolerance": 1.0})[0][0] == 0


def test_a_nan_is_a_difference(world: Path, tmp_path: Path) -> None:
    changed = copy_as(world / "policy", tmp_path / "changed")
    tensors = read_tensors(changed)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    write_tensors(changed, tensors)
    assert run_ranks(_verify, 1, world / "policy", changed, {"tolerance": 1e9})[0][0] == 1


def test_models_that_cannot_be_compared(world: Path) -> None:
    with pytest.raises(ConfigError, match="different heads or vocabularies"):
        _verify(world / "policy", world / "reward_model", {})
    with pytest.raises(ConfigError, match=r"pipeline_size=3; set it to at most 2"):
        _verify(world / "policy", world / "policy", {"pipeline_size": 3})
