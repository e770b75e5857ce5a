"""Between Hugging Face's tensors and this rank's parameters, both ways, as the family's table of weights says: for
weights, and for anything of a parameter's shape, such as gradients and Adam's moments."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_gil.models.heads import ScalarHead
from megatron_gil.models.hf_files import HfTensors
from megatron_gil.models.llama import LlamaSpec
from megatron_gil.models.weight_table import Shape, Weight, WeightTable
from megatron_gil.parallel.collectives import concat_over_tp
from megatron_gil.parallel.layout import ParallelLayout

ReadSlice = Callable[[str, tuple[slice, ...]], Tensor]


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


class WeightMap:
    """The entries of one pipeline stage of one model, and the two directions."""

    def __init__(self, spec: LlamaSpec, model: GPTModel, layout: ParallelLayout) -> None:
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

    def to_full(self, param_name: str, local: Tensor) -> dict[str, Tensor]:
        """Hugging Face's tensors, bit for bit, of one parameter-shaped tensor; all tensor-parallel ranks call it
        together, and all get the result."""
        entry = self._by_name[param_name]
        weight, dim = entry.weight, entry.weight.shard_dim
        assert tuple(local.shape) == weight.local_shape(self.layout.tp_size), (param_name, local.shape)
        full = {}
        for name, shape, part in zip(entry.hf_names, self.full_shape(entry), self._split(weight, local), strict=True):
            whole = part.contiguous() if dim is None else concat_over_tp(part.contiguous(), dim, self.layout)
            full[name] = whole[: shape[0]]  # without the rows that pad the vocabulary
        return full

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

    def _split(self, weight: Weight, local: Tensor) -> list[Tensor]:
        num_blocks = self._num_blocks(weight)
        rows = [shape[0] // num_blocks for shape in weight.part_shapes(self.layout.tp_size)]
        blocks = local.reshape(num_blocks, sum(rows), *local.shape[1:])
        return [part.flatten(0, 1) for part in blocks.split(rows, dim=1)]

    def _fuse(self, weight: Weight, parts: list[Tensor]) -> Tensor:
        num_blocks = self._num_blocks(weight)
        blocks = [part.reshape(num_blocks, -1, *part.shape[1:]) for part in parts]
        return torch.cat(blocks, dim=1).flatten(0, 1) if len(blocks) > 1 else parts[0]


@torch.no_grad()
def load_weights(model: GPTModel, spec: LlamaSpec, hf_dir: Path, layout: ParallelLayout) -> list[str]:
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


def _weight_table(spec: LlamaSpec, model: GPTModel) -> WeightTable:
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
