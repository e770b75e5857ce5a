"""Reading the safetensors files of a Hugging Face directory, slice by slice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_gil.config import ConfigError
from megatron_gil.models.convert.weight_files import find_files


@dataclass(frozen=True, slots=True)
class HfTensors:
    """The tensors of a directory by name. Of several files, each is opened when something of it is read: of the
    hundreds that a large run writes, a rank needs a few."""

    directory: Path
    files: dict[str, Path]  # tensor name -> file that holds it
    handles: dict[Path, Any]  # those opened so far

    @classmethod
    def open(cls, hf_dir: Path, stem: str = "model") -> Self:
        """Of the files that find_files names, as every check of the directory does."""
        directory = Path(hf_dir)
        single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
        if index.exists() and not single.exists():
            return cls(directory, _read_index(index), {})
        handles = {path: _open_file(path) for path in find_files(directory, stem, ".safetensors") or [single]}
        return cls(
            directory, {name: path for path, handle in handles.items() for name in handle.offset_keys()}, handles
        )

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ConfigError for a name that is not there."""
        if name not in self.files:
            raise ConfigError(f"{self.directory}: no tensor {name} in its safetensors files; is it this kind of model?")
        return tuple(self._slice(name).get_shape())

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        found = self.shape(name)
        if found != expected:
            raise ConfigError(
                f"{self.files[name]}: tensor {name} has shape {list(found)}, expected {list(expected)} by config.json"
            )

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """That part of the tensor, in the file's dtype."""
        return self._slice(name)[index]

    def _slice(self, name: str) -> Any:
        path = self.files[name]
        if path not in self.handles:
            self.handles[path] = _open_file(path)
        try:
            return self.handles[path].get_slice(name)
        except SafetensorError:
            raise ConfigError(f"{path}: no tensor {name}, which the index says it holds") from None


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {name: path.parent / file for name, file in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ConfigError(f"{path}: must be a JSON object with a weight_map of tensor names to files") from None


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; give a directory that holds the model's safetensors files") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read as safetensors: {error}") from None
