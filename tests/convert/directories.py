"""Hugging Face directories in every form that import reads, and what tests look at afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Form = Literal["single", "index", "shards"]


def read_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def assert_equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def copy_as(source: Path, target: Path, *, dtype: torch.dtype = torch.float32, form: Form = "single") -> Path:
    """The model of `source` in another dtype: one file, three with an index, or three without one."""
    shutil.copytree(source, target)
    for path in target.glob("model*.safetensors*"):
        path.unlink()
    write_tensors(target, {name: t.to(dtype) for name, t in read_tensors(source).items()}, form)
    edit_config(target, dtype=str(dtype).removeprefix("torch."))
    return target


def write_tensors(directory: Path, tensors: dict[str, Tensor], form: Form = "single") -> None:
    if form == "single":
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(3):
        part = {name: tensors[name] for name in list(tensors)[i::3]}
        name = f"model-{i + 1:05}-of-00003.safetensors"
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if form == "index":
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def files_under(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
