"""What the safetensors files of a directory hold, from their headers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from megatron_gil.config import ConfigError

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""torch's names -> those of safetensors."""
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    dtype: str
    """A key of ITEM_BYTES."""
    shape: tuple[int, ...]
    offset: int = 0
    """Of its first byte in the file."""

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def safetensors_header(tensors: Mapping[str, StoredTensor]) -> bytes:
    """What a safetensors file begins with whose tensors follow each other in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


class WeightFile(Protocol):
    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> dict[str, StoredTensor]: ...

    def chunks(self, name: str) -> Iterator[Any]:
        """The tensor's bytes, in pieces of whole numbers, none longer than CHUNK_BYTES where that saves memory."""
        ...


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    path: Path
    tensors: dict[str, StoredTensor]  # in the order of the file
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> SafetensorsFile:
        """The library checks the header against the file's length; ConfigError for all it refuses."""
        try:
            with safe_open(path, framework="numpy") as handle, path.open("rb") as file:
                offset = 8 + int.from_bytes(file.read(8), "little")
                tensors = {}
                for name in handle.offset_keys():
                    part = handle.get_slice(name)
                    tensor = StoredTensor(check_dtype(path, name, part.get_dtype()), tuple(part.get_shape()), offset)
                    tensors[name] = tensor
                    offset += tensor.num_bytes
                return cls(path, tensors, dict(handle.metadata() or {}))
        except FileNotFoundError:
            raise ConfigError(f"{path}: not found") from None
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: cut off or not a safetensors file: {error}") from None

    def chunks(self, name: str) -> Iterator[bytes]:
        tensor = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            for start in range(0, tensor.num_bytes, CHUNK_BYTES):
                yield file.read(min(CHUNK_BYTES, tensor.num_bytes - start))


def check_dtype(path: Path, name: str, dtype: str) -> str:
    if dtype not in ITEM_BYTES:
        raise ConfigError(f"{path}: tensor {name} is of {dtype}, expected F32, BF16 or F16 (quantized weights are not)")
    return dtype


def read_safetensors(directory: Path) -> list[SafetensorsFile]:
    """All weight files of a directory; ConfigError where there are none, one is missing or they contradict another."""
    files = [SafetensorsFile.read(path) for path in find_files(directory, "model", ".safetensors")]
    if files:
        return files
    if any(directory.glob("pytorch_model*.bin")):
        raise ConfigError(
            f"{directory}: holds .bin files only, which are pickles; `convert import --allow-bin` reads their tensors"
        )
    raise ConfigError(
        f"{directory}: holds no model.safetensors or model-*-of-*.safetensors; give a directory that does"
    )


def find_files(directory: Path, stem: str, suffix: str) -> list[Path]:
    """STEM.SUFFIX if there is one (as transformers chooses), else what the index names, else STEM-*-of-*SUFFIX."""
    single, index = directory / f"{stem}{suffix}", directory / f"{stem}{suffix}.index.json"
    if single.exists():
        return [single]
    if index.exists():
        return [directory / name for name in _read_index(index)]
    return _numbered(directory, stem, suffix)


def _read_index(path: Path) -> list[str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ConfigError(f"{path}: must be a JSON object with a weight_map of tensor names to files") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise ConfigError(f"{path}: weight_map names the file {name!r}, expected one beside the index")
    if not names:
        raise ConfigError(f"{path}: weight_map is empty")
    return names


def _numbered(directory: Path, stem: str, suffix: str) -> list[Path]:
    pattern = re.compile(rf"{stem}-(\d+)-of-(\d+){re.escape(suffix)}")
    found = {match[0]: match for path in directory.glob(f"{stem}-*{suffix}") if (match := pattern.fullmatch(path.name))}
    if not found:
        return []
    count = max(int(match[2]) for match in found.values())
    present = {int(match[1]) for match in found.values()}
    if len(found) != count or present != set(range(1, count + 1)):
        missing = min(set(range(1, count + 1)) - present, default=None)
        what = f"file {missing} of {count} is missing" if missing else "files of different sets are mixed"
        raise ConfigError(f"{directory}: {what} among {stem}-*-of-*{suffix}, and there is no index")
    return [directory / name for name in sorted(found)]
