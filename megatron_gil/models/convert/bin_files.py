"""pytorch_model*.bin: pickles, read only when asked for, and of them nothing but tensors."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gil.config import ConfigError
from megatron_gil.models.convert.weight_files import DTYPES, StoredTensor, check_dtype, find_files


@dataclass(frozen=True, slots=True)
class BinFile:
    path: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def read(cls, path: Path) -> BinFile:
        import torch

        loaded = _load(path)
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path}: holds a {type(loaded).__name__}, expected tensors by name")
        tensors = {}
        for name, tensor in loaded.items():
            if not isinstance(tensor, torch.Tensor):
                raise ConfigError(f"{path}: {name} is a {type(tensor).__name__}, expected a tensor")
            dtype = str(tensor.dtype).removeprefix("torch.")
            tensors[str(name)] = StoredTensor(check_dtype(path, name, DTYPES.get(dtype, dtype)), tuple(tensor.shape))
        return cls(path, tensors)

    def chunks(self, name: str) -> Iterator[Any]:
        """Mapped anew for each tensor: the pages of a map that stays would pile up in memory."""
        import torch

        yield _load(self.path)[name].contiguous().view(-1).view(torch.uint8).numpy().data


def _load(path: Path) -> Any:
    """What the pickle holds, its tensors mapped and not read."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found") from None
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: holds more than tensors, which is never loaded: {reason}") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(f"{path}: cut off or not written by torch.save: {str(error).splitlines()[0]}") from None


def read_bin_files(directory: Path) -> list[BinFile]:
    paths = find_files(directory, "pytorch_model", ".bin")
    if not paths:
        raise ConfigError(f"{directory}: holds neither safetensors nor pytorch_model*.bin files")
    return [BinFile.read(path) for path in paths]
