"""Between Hugging Face's tensors and this rank's parameters, both ways, as the family's table of weights says: for
weights, and for anything of a parameter's shape, such as gradients and Adam's moments."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_gil.models.families import ModelSpec
from megatron_gil.models.heads import ScalarHead
from megatron_gil.models.hf_files import HfTensors
from megatron_gil.models.slices import Index, index_shape
from megatron_gil.models.weight_table import Shape, Weight, WeightTable
from megatron_gil.parallel.layout import ParallelLayout

ReadSlice = Callable[[str, Index], Tensor]


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of this rank."""

    param_name: str  # as in model.named_parameters()
    hf_names: tuple[str, ...]
    weight: Weight

    @property
    def is_copy(self) -> bool:
        """The tied embedding's second copy, on the last pipeline rank: read, not written."""
        return self.weight.is_copy


@dataclass(frozen=True, slots=True)
class Piece:
    """What one run of a flattened local parameter holds of one Hugging Face tensor."""

    hf_name: str
    index: Index
    """Where in the whole tensor it lies."""
    whole: Shape
    """Of that tensor."""
    run: slice
    """Elements of the flattened parameter: whole rows, or a part of one row."""
    rows: slice | Tensor
    """[rows of the piece], among the rows of the run."""

    def of(self, flat: Tensor, start: int) -> Tensor:
        """The piece from `flat`, the elements from `start` on of a flattened parameter; a view of it, or a copy."""
        return self._rows(flat, start)[self.rows].view(index_shape(self.index))

    def put(self, value: Tensor, flat: Tensor, start: int) -> None:
        """The other way: write the piece into `flat`."""
        rows = self._rows(flat, start)
        rows[self.rows] = value.reshape(-1, rows.shape[1]).to(flat.dtype)

    def _rows(self, flat: Tensor, start: int) -> Tensor:
        run = flat[self.run.start - start : self.run.stop - start]
        return run.view(-1, prod(index_shape(self.index)[1:]))


class WeightMap:
    """The entries of one pipeline stage of one model, and the two directions."""

    def __init__(self, spec: ModelSpec, model: GPTModel, layout: ParallelLayout) -> None:
        self.model, self.layout = model, layout
        table = _weight_table(spec, model)
        weights = {name: weight for weight in (*table.first, *table.layer, *table.last) for name in weight.param_names}
        first_layer = spec.layers_of(layout.pp_rank, layout.pp_size).start
        self._by_name: dict[str, Entry] = {}
        for name, parameter in model.named_parameters():
            entry = self._by_name[name] = _make_entry(name, weights, first_layer)
            expected = entry.weight.local_shape(layout.tp_size)
            assert tuple(parameter.shape) == expected, (name, parameter.shape, expected)
        self.entries = list(self._by_name.values())

    def full_shape(self, entry: Entry) -> tuple[Shape, ...]:
        """Shapes of the entry's Hugging Face tensors, in the order of `hf_names`."""
        return tuple(part.shape for part in entry.weight.parts)

    def entry(self, param_name: str) -> Entry:
        return self._by_name[param_name]

    def split(self, param_name: str, local: Tensor) -> dict[str, Tensor]:
        """This rank's parts of the Hugging Face tensors in one parameter-shaped tensor, with the rows that pad the
        vocabulary."""
        entry = self._by_name[param_name]
        weight = entry.weight
        assert tuple(local.shape) == weight.local_shape(self.layout.tp_size), (param_name, local.shape)
        num_blocks = self._num_blocks(weight)
        rows = [shape[0] // num_blocks for shape in self._part_shapes(entry)]
        blocks = local.reshape(num_blocks, sum(rows), *local.shape[1:])
        parts = [part.flatten(0, 1) for part in blocks.split(rows, dim=1)]
        return dict(zip(entry.hf_names, parts, strict=True))

    def pieces(self, param_name: str, start: int, end: int) -> Iterator[Piece]:
        """What the elements [start, end) of a flattened local parameter hold of Hugging Face's tensors: of each at most
        three rectangles. Rows that pad the vocabulary belong to none."""
        entry = self._by_name[param_name]
        weight = entry.weight
        local = weight.local_shape(self.layout.tp_size)
        width, block = prod(local[1:]), local[0] // self._num_blocks(weight)
        for run in _runs(start, end, width):
            row, column = divmod(run.start, width)
            num_rows = max(1, (run.stop - run.start) // width)
            columns = slice(column, column + (run.stop - run.start) // num_rows)
            offset = 0
            for name, whole, part in zip(entry.hf_names, self.full_shape(entry), self._part_shapes(entry), strict=True):
                size = part[0] // self._num_blocks(weight)
                before, until = (_count_rows(r, block, offset, size) for r in (row, row + num_rows))
                index = self._whole_index(weight.shard_dim, whole, part, slice(before, until), columns)
                if index[0].start < index[0].stop:
                    of_part = torch.arange(before, before + index[0].stop - index[0].start)
                    rows = of_part // size * block + offset + of_part % size - row
                    yield Piece(name, index, whole, run, _as_slice(rows))
                offset += size

    def to_local(self, param_name: str, read: ReadSlice) -> Tensor:
        """This rank's part, from `read(hf_name, slices)`; rows that pad the vocabulary are zero."""
        entry = self._by_name[param_name]
        parts = []
        for name, whole, shape in zip(entry.hf_names, self.full_shape(entry), self._part_shapes(entry), strict=True):
            part = read(name, self._local_slices(entry.weight.shard_dim, whole, shape))
            if part.shape[0] < shape[0]:
                part = torch.cat([part, part.new_zeros(shape[0] - part.shape[0], *shape[1:])])
            parts.append(part)
        return self._fuse(entry.weight, parts)

    def _part_shapes(self, entry: Entry) -> tuple[Shape, ...]:
        return entry.weight.part_shapes(self.layout.tp_size)

    def _local_slices(self, shard_dim: int | None, whole: Shape, part: Shape) -> tuple[slice, ...]:
        slices = [slice(0, size) for size in part]
        if shard_dim is not None:
            start = self.layout.tp_rank * part[shard_dim]
            slices[shard_dim] = slice(start, min(start + part[shard_dim], whole[shard_dim]))
        return tuple(slices)

    def _num_blocks(self, weight: Weight) -> int:
        """On this rank."""
        return 1 if weight.num_blocks is None else weight.num_blocks // self.layout.tp_size

    def _whole_index(self, shard_dim: int | None, whole: Shape, part: Shape, rows: slice, columns: slice) -> Index:
        """Where rows and columns of this rank's part lie in the whole tensor; without rows that it does not have."""
        index = []
        for dim, local in enumerate((rows, columns)[: len(whole)]):
            first = self.layout.tp_rank * part[dim] if dim == shard_dim else 0
            index.append(slice(first + local.start, min(first + local.stop, whole[dim])))
        return tuple(index)

    def _fuse(self, weight: Weight, parts: list[Tensor]) -> Tensor:
        num_blocks = self._num_blocks(weight)
        blocks = [part.reshape(num_blocks, -1, *part.shape[1:]) for part in parts]
        return torch.cat(blocks, dim=1).flatten(0, 1) if len(blocks) > 1 else parts[0]


@torch.no_grad()
def load_weights(model: GPTModel, spec: ModelSpec, hf_dir: Path, layout: ParallelLayout) -> list[str]:
    """Fill the model from a Hugging Face directory, each rank reading only its part, cast to the model's dtype.

    Returns the head tensors (score.weight, group_head.weight) that the directory lacks, for the caller to start;
    ConfigError for anything else missing or of another shape.
    """
    tensors = HfTensors.open(hf_dir)
    weights = WeightMap(spec, model, layout)
    params = dict(model.named_parameters())
    absent = []
    for entry in weights.entries:
        if entry.weight.optional and entry.hf_names[0] not in tensors:
            absent.append(entry.hf_names[0])
            continue
        for name, shape in zip(entry.hf_names, weights.full_shape(entry), strict=True):
            tensors.check_shape(name, shape)
        params[entry.param_name].copy_(weights.to_local(entry.param_name, tensors.read))
    return absent


def _runs(start: int, end: int, width: int) -> list[slice]:
    """[start, end) cut where whole rows of `width` elements begin and end."""
    whole = (-(-start // width) * width, end // width * width)
    cuts = sorted({start, *(cut for cut in whole if start < cut < end), end})
    return [slice(one, next_one) for one, next_one in pairwise(cuts)]


def _count_rows(row: int, block: int, offset: int, size: int) -> int:
    """How many of the rows before `row` belong to the part that has `size` rows from `offset` on in each block."""
    return row // block * size + min(max(row % block - offset, 0), size)


def _as_slice(rows: Tensor) -> slice | Tensor:
    """The same rows, as a slice where they follow each other."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _weight_table(spec: ModelSpec, model: GPTModel) -> WeightTable:
    """A pipeline rank without the last layer holds no head: there, all heads' tables say the same."""
    head = getattr(model, "output_layer", None)
    if isinstance(head, ScalarHead):
        return spec.weights("critic", head.num_groups)
    return spec.weights("lm")


def _make_entry(param_name: str, weights: dict[str, Weight], first_layer: int) -> Entry:
    """weights: by megatron-core's names, with {layer} in the place of the layer's number."""
    match = re.search(r"\.layers\.(\d+)\.", param_name)
    layer = first_layer + int(match[1]) if match else 0
    weight = weights[re.sub(r"\.layers\.\d+\.", ".layers.{layer}.", param_name)]
    return Entry(param_name, tuple(part.name.format(layer=layer) for part in weight.parts), weight)
