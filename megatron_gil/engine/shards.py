"""Writing one set of named tensors from many ranks, as safetensors files with an index, in Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from megatron_gil.engine.files import FileWriter
from megatron_gil.parallel.collectives import gather_objects
from megatron_gil.parallel.layout import ParallelLayout

MAX_FILE_BYTES = 2 << 30

Renames = dict[Path, Path]
"""Where a file was written -> where it belongs; rank 0 moves them when all ranks have written."""


class ShardWriter:
    """Each rank adds the tensors it owns; the files belong at STEM-00001-of-0000N, with STEM's index.

    The files of all ranks lie in one directory that all ranks see.
    """

    def __init__(self, directory: Path, layout: ParallelLayout, files: FileWriter, *, stem: str = "model") -> None:
        self._directory, self._layout, self._files, self._stem = directory, layout, files, stem
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._parts: list[tuple[str, dict[str, int]]] = []  # (file, tensor name -> bytes)

    def add(self, name: str, tensor: Tensor) -> None:
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= MAX_FILE_BYTES:
            self._flush()

    def close(self) -> Renames:
        """Collective; the same on every rank."""
        self._flush()
        parts = [part for rank_parts in gather_objects(self._parts, self._layout) for part in rank_parts]
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

    def _flush(self) -> None:
        if not self._pending:
            return
        name = f".{self._stem}-rank{self._layout.rank:05}-{len(self._parts):05}"
        self._files.tensors(self._directory / name, self._pending)
        self._parts.append((name, {key: tensor.nbytes for key, tensor in self._pending.items()}))
        self._pending, self._pending_bytes = {}, 0
