"""Writing one set of named tensors from many ranks, as safetensors files with an index, in Hugging Face's layout."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megatron_gil.parallel.collectives import barrier, gather_objects
from megatron_gil.parallel.layout import ParallelLayout

MAX_FILE_BYTES = 2 << 30


class ShardWriter:
    """Each rank adds the tensors it owns; `close` names the files STEM-00001-of-0000N and writes STEM's index.

    The files of all ranks lie in one directory that all ranks see.
    """

    def __init__(self, directory: Path, layout: ParallelLayout, *, stem: str = "model") -> None:
        self._directory, self._layout, self._stem = directory, layout, stem
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._parts: list[tuple[str, dict[str, int]]] = []  # (file, tensor name -> bytes)

    def add(self, name: str, tensor: Tensor) -> None:
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= MAX_FILE_BYTES:
            self._flush()

    def close(self) -> list[str]:
        """Collective; the names of all files written, the same on every rank."""
        self._flush()
        parts = [part for rank_parts in gather_objects(self._parts, self._layout) for part in rank_parts]
        single = len(parts) == 1
        names = [
            f"{self._stem}.safetensors" if single else f"{self._stem}-{i:05}-of-{len(parts):05}.safetensors"
            for i in range(1, len(parts) + 1)
        ]
        if self._layout.is_main:
            for (part, _), name in zip(parts, names, strict=True):
                (self._directory / part).rename(self._directory / name)
            if not single:
                names.append(self._write_index(parts, names))
        elif not single:
            names.append(f"{self._stem}.safetensors.index.json")
        barrier(self._layout)
        return names

    def _write_index(self, parts: list[tuple[str, dict[str, int]]], names: list[str]) -> str:
        weight_map = {tensor: name for (_, sizes), name in zip(parts, names, strict=True) for tensor in sizes}
        total = sum(size for _, sizes in parts for size in sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        name = f"{self._stem}.safetensors.index.json"
        write_text(self._directory / name, json.dumps(index, indent=1))
        return name

    def _flush(self) -> None:
        if not self._pending:
            return
        name = f".{self._stem}-rank{self._layout.rank:05}-{len(self._parts):05}"
        save_file(self._pending, self._directory / name, metadata={"format": "pt"})
        sync_file(self._directory / name)
        self._parts.append((name, {key: tensor.nbytes for key, tensor in self._pending.items()}))
        self._pending, self._pending_bytes = {}, 0


def write_text(path: Path, text: str) -> None:
    """The file on disk, or an exception; never half of it under its name."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    sync_file(beside)
    beside.replace(path)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
