"""Reading the safetensors files of a Hugging Face directory, slice by slice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_gil.config import ConfigError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class HfTensors:
    """The tensors of a directory by name; opening reads headers only."""

    files: dict[str, Path]  # tensor name -> file that holds it
    handles: dict[Path, Any]
    directory: Path

    @classmethod
    def open(cls, hf_dir: Path, single_file: str = SINGLE_FILE, index_file: str = INDEX_FILE) -> Self:
        directory = Path(hf_dir)
        index = directory / index_file
        paths = _read_index(index) if index.exists() else [directory / single_file]
        handles = {path: _open_file(path) for path in paths}
        files = {name: path for path, handle in handles.items() for name in handle.keys()}  # noqa: SIM118  no dict
        return cls(files, handles, directory)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ConfigError for a name that is not there."""
        if name not in self.files:
            raise ConfigError(f"{self.directory}: no tensor {name} in its safetensors files; is it this kind of model?")
        return tuple(self.handles[self.files[name]].get_slice(name).get_shape())

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        found = self.shape(name)
        if found != expected:
            raise ConfigError(
                f"{self.files[name]}: tensor {name} has shape {list(found)}, expected {list(expected)} by config.json"
            )

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """That part of the tensor, in the file's dtype."""
        return self.handles[self.files[name]].get_slice(name)[index]


def _read_index(path: Path) -> list[Path]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return [path.parent / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ConfigError(f"{path}: must be a JSON object with a weight_map of tensor names to files") from None


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; give a directory that holds the model's safetensors files") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read as safetensors: {error}") from None
