"""Writing one set of named tensors, or slices of tensors, from many ranks as safetensors files with an index, in
Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_gil.engine.files import FileWriter
from megatron_gil.models.convert.weight_files import DTYPES, StoredTensor, safetensors_header
from megatron_gil.parallel.collectives import gather_objects
from megatron_gil.parallel.layout import ParallelLayout

MAX_FILE_BYTES = 2 << 30

Renames = dict[Path, Path]
"""Where a file was written -> where it belongs; rank 0 moves them when all ranks have written."""


class ShardWriter:
    """Each rank writes the tensors it owns; the files belong at STEM-00001-of-0000N, with STEM's index.

    The files of all ranks lie in one directory that all ranks see. A file begins with the sizes of all that it holds,
    so they are told beforehand; then one tensor after the other goes to disk, and no more than one is held. In the
    background the rank's own tensors are all held, in host memory.
    """

    def __init__(
        self,
        directory: Path,
        layout: ParallelLayout,
        files: FileWriter,
        planned: Mapping[str, StoredTensor],
        *,
        stem: str = "model",
    ) -> None:
        """planned: what this rank will add, in this order."""
        self._directory, self._layout, self._files, self._stem = directory, layout, files, stem
        self._parts = [
            (f".{stem}-rank{layout.rank:05}-{number:05}", tensors)
            for number, tensors in enumerate(_cut(planned, MAX_FILE_BYTES))
        ]
        self._coming = iter([(file, tensors, name) for file, tensors in self._parts for name in tensors])

    def add(self, name: str, tensor: Tensor) -> None:
        """The next of the planned tensors."""
        file, tensors, expected = next(self._coming)
        stored = stored_tensor(tensor)
        assert (name, stored) == (expected, tensors[expected]), (name, expected, stored)
        if name == next(iter(tensors)):
            self._files.begin(self._directory / file)
            self._files.append(safetensors_header(tensors))
        self._files.append(tensor.detach().to("cpu", copy=self._files.background).contiguous())
        if name == next(reversed(tensors)):
            self._files.end()

    def close(self) -> Renames:
        """Collective; the same on every rank."""
        assert next(self._coming, None) is None, "a planned tensor was not added"
        mine = [(file, {name: tensor.num_bytes for name, tensor in tensors.items()}) for file, tensors in self._parts]
        parts = [part for rank_parts in gather_objects(mine, self._layout) for part in rank_parts]
        single = len(parts) == 1
        names = [
            f"{self._stem}.safetensors" if single else f"{self._stem}-{i:05}-of-{len(parts):05}.safetensors"
            for i in range(1, len(parts) + 1)
        ]
        if self._layout.is_main and not single:
            self._write_index(parts, names)
        return {self._directory / part: self._directory / name for (part, _), name in zip(parts, names, strict=True)}

    def _write_index(self, parts: list[tuple[str, dict[str, int]]], names: list[str]) -> None:
        weight_map = {tensor: name for (_, sizes), name in zip(parts, names, strict=True) for tensor in sizes}
        total = sum(size for _, sizes in parts for size in sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self._files.text(self._directory / f"{self._stem}.safetensors.index.json", json.dumps(index, indent=1))


def stored_tensor(tensor: Tensor) -> StoredTensor:
    return StoredTensor(stored_dtype(tensor.dtype), tuple(tensor.shape))


def stored_dtype(dtype: torch.dtype) -> str:
    return DTYPES[str(dtype).removeprefix("torch.")]


def _cut(planned: Mapping[str, StoredTensor], max_bytes: int) -> Iterator[dict[str, StoredTensor]]:
    """Into files, each closed once it has so many bytes."""
    part, size = dict[str, StoredTensor](), 0
    for name, tensor in planned.items():
        part[name] = tensor
        size += tensor.num_bytes
        if size >= max_bytes:
            yield part
            part, size = {}, 0
    if part:
        yield part
