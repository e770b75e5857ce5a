"""Tensors that are stored in slices, each a rectangle of the tensor: how a slice is named, and reading across them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from torch import Tensor

from megatron_gil.config import ConfigError
from megatron_gil.models.hf_files import HfTensors
from megatron_gil.models.weight_table import Shape

Index = tuple[slice, ...]
"""A rectangle of a tensor: a start and a stop along each axis."""


def index_shape(index: Index) -> Shape:
    return tuple(part.stop - part.start for part in index)


@dataclass(frozen=True, slots=True)
class SlicedTensors:
    """Tensors by name of a directory whose files hold them whole, or in slices named NAME[0:8,0:4]."""

    tensors: HfTensors
    slices: dict[str, list[tuple[str, Index]]] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path, stem: str) -> Self:
        opened = cls(HfTensors.open(directory, stem))
        for key in opened.tensors.files:
            name, index = _parse(key)
            opened.slices.setdefault(name, []).append((key, index))
        return opened

    def read(self, name: str, wanted: Index) -> Tensor:
        """That part of the tensor; only files that hold some of it are read."""
        if name in self.tensors:
            return self.tensors.read(name, wanted)
        found, num_read = None, 0
        for key, index in self.slices.get(name, []):
            both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(index, wanted, strict=True))
            if any(part.start >= part.stop for part in both):
                continue
            value = self.tensors.read(key, _within(both, index))
            found = value.new_empty(index_shape(wanted)) if found is None else found
            found[_within(both, wanted)] = value
            num_read += value.numel()
        if found is None or num_read != found.numel():
            raise ConfigError(f"{self.tensors.directory}: its safetensors files do not hold all of {name}")
        return found

    def shape(self, name: str) -> Shape:
        """Of the whole tensor."""
        if name in self.tensors:
            return self.tensors.shape(name)
        indexes = [index for _, index in self.slices[name]]
        return tuple(max(part.stop for part in parts) for parts in zip(*indexes, strict=True))


def slice_name(name: str, index: Index, whole: Shape) -> str:
    """The key of a slice, as SlicedTensors reads it; a slice that is all of the tensor has the tensor's own."""
    if index_shape(index) == whole:
        return name
    return f"{name}[{','.join(f'{part.start}:{part.stop}' for part in index)}]"


def _parse(key: str) -> tuple[str, Index]:
    match = re.fullmatch(r"(.+)\[(\d+:\d+(?:,\d+:\d+)*)\]", key)
    if match is None:
        return key, ()
    parts = [part.split(":") for part in match[2].split(",")]
    return match[1], tuple(slice(int(start), int(stop)) for start, stop in parts)


def _within(inner: Index, outer: Index) -> Index:
    """`inner` counted from where `outer` begins."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, outer, strict=True))
