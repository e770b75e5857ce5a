"""What a model family's table of tensors is written in: each of megatron-core's parameters, with the Hugging Face
tensors that it is made of and the way in which tensor-parallel ranks share it.

Such a table is the only place that lists the tensors of a layer. Loading and saving, conversion, planning and decoding
read it. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
SCORE_HEAD = "score.weight"
SCORE_BIAS = "score.bias"
GROUP_HEAD = "group_head.weight"
"""Our group classifier, beside the critic's score.weight; the others are transformers' names in every family, save the
bias, which is in none: other programs write it."""


@dataclass(frozen=True, slots=True)
class HfTensor:
    name: str
    """May hold {layer}, the layer's number over the whole model, from 0."""
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter of megatron-core: its Hugging Face parts, one below the other along the first axis."""

    name: str
    """Ours; the decoder finds a layer's weights by it (engine/decoder_weights.py)."""
    param_names: tuple[str, ...]
    """megatron-core's: in its own layers and, where Transformer Engine's layers have another, in those. May hold
    {layer}, the layer's number on its pipeline rank."""
    parts: tuple[HfTensor, ...]
    shard_dim: int | None
    """The axis that tensor-parallel ranks share, each holding one slice of every part; None: each rank holds all."""
    num_blocks: int | None = None
    """Where the parts are cut into so many blocks that alternate (block 0 of each part, then block 1 of each, ...), as
    the query, key and value heads are: the number over all ranks. None: on each rank the parts follow each other."""
    is_copy: bool = False
    """The tied embedding's second copy, which the last of several pipeline ranks holds: read, not written."""
    optional: bool = False
    """A directory may lack it: a head that training starts by itself."""

    def part_shapes(self, tp_size: int) -> tuple[Shape, ...]:
        """Of the parts on one tensor-parallel rank. Only the vocabulary may not divide: it is padded, so that all ranks
        hold the same shape."""
        return tuple(
            tuple(-(-size // tp_size) if dim == self.shard_dim else size for dim, size in enumerate(part.shape))
            for part in self.parts
        )

    def local_shape(self, tp_size: int) -> Shape:
        """Of the parameter on one tensor-parallel rank."""
        shapes = self.part_shapes(tp_size)
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def num_elements(self, tp_size: int) -> int:
        return prod(self.local_shape(tp_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTable:
    """All weights of one model."""

    first: tuple[Weight, ...]
    """Before the layers, on the first pipeline rank."""
    layer: tuple[Weight, ...]
    """Of each layer."""
    last: tuple[Weight, ...]
    """After the layers, on the last pipeline rank."""

    def hf_tensors(self, num_layers: int) -> Iterator[tuple[Weight, HfTensor]]:
        """Every Hugging Face tensor of a model with so many layers, once, in the model's order."""
        yield from ((weight, part) for weight in self.first for part in weight.parts)
        for layer in range(num_layers):
            for weight in self.layer:
                yield from ((weight, HfTensor(part.name.format(layer=layer), part.shape)) for part in weight.parts)
        yield from ((weight, part) for weight in self.last if not weight.is_copy for part in weight.parts)
