"""Pickled weights: only when asked for, only tensors, and the same bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_gil.config import ConfigError
from megatron_gil.models.convert.copy import import_model
from tests.convert.directories import assert_equal_bits, copy_as, files_under, read_tensors


def _as_bin(source: Path, parts: int) -> dict[str, Tensor]:
    """Replace the safetensors file of a directory by pickles; the tensors."""
    tensors = read_tensors(source)
    (source / "model.safetensors").unlink()
    for i in range(parts):
        name = "pytorch_model.bin" if parts == 1 else f"pytorch_model-{i + 1:05}-of-{parts:05}.bin"
        torch.save({key: tensors[key] for key in list(tensors)[i::parts]}, source / name)
    return tensors


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_bit_comes_over(world: Path, tmp_path: Path, dtype: torch.dtype, parts: int) -> None:
    source = copy_as(world / "tied", tmp_path / "source", dtype=dtype)
    tensors = _as_bin(source, parts)
    import_model(source, tmp_path / "imported", allow_bin=True)
    assert_equal_bits(read_tensors(tmp_path / "imported"), tensors)
    assert not list((tmp_path / "imported").glob("*.bin"))


def test_tensors_that_share_memory_come_over(world: Path, tmp_path: Path) -> None:
    """As tied weights are pickled; and transposed ones, which are not contiguous."""
    source = copy_as(world / "tied", tmp_path / "source")
    tensors = _as_bin(source, 1)
    name = "model.layers.0.mlp.up_proj.weight"
    stored = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"], name: tensors[name].T.contiguous().T}
    torch.save(stored, source / "pytorch_model.bin")
    import_model(source, tmp_path / "imported", allow_bin=True)
    assert_equal_bits(read_tensors(tmp_path / "imported"), stored)


def test_safetensors_are_taken_where_there_are_both(world: Path, tmp_path: Path) -> None:
    source = copy_as(world / "tied", tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"nonsense")
    import_model(source, tmp_path / "imported", allow_bin=True)


class _Intruder:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_nothing_in_a_pickle_is_run(world: Path, tmp_path: Path) -> None:
    source = copy_as(world / "tied", tmp_path / "source")
    tensors = _as_bin(source, 1)
    torch.save({**tensors, "extra": _Intruder(tmp_path / "marker")}, source / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"holds \.bin files only, which are pickles; `convert import --allow-bin`"):
        import_model(source, tmp_path / "imported")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin: holds more than tensors, which is never loaded"):
        import_model(source, tmp_path / "imported", allow_bin=True)
    assert files_under(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"a": 3}, "a is a int, expected a tensor"),
        ([1], "holds a list, expected tensors by name"),
        ({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, "model.norm.weight is of int8, expected F32"),
    ],
)
def test_a_wrong_pickle_is_named(world: Path, tmp_path: Path, content: Any, part: str) -> None:
    source = copy_as(world / "tied", tmp_path / "source")
    _as_bin(source, 1)
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin: ") as raised:
        import_model(source, tmp_path / "imported", allow_bin=True)
    assert part in str(raised.value)


@pytest.mark.parametrize("keep", [0, 10, 2000, -1])
def test_a_cut_pickle_is_named(world: Path, tmp_path: Path, keep: int) -> None:
    source = copy_as(world / "tied", tmp_path / "source")
    _as_bin(source, 1)
    path = source / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin: (cut off|holds more)") as raised:
        import_model(source, tmp_path / "imported", allow_bin=True)
    assert "\n" not in str(raised.value)
    assert files_under(tmp_path) == ["source"]
