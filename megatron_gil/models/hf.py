"""The one table between Hugging Face's tensors and this rank's parameters, used both ways: for weights, and for
anything of a parameter's shape, such as gradients and Adam's moments."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_gil.models.hf_files import HfTensors
from megatron_gil.models.llama import LlamaSpec
from megatron_gil.parallel.collectives import concat_over_tp
from megatron_gil.parallel.layout import ParallelLayout

Fusion = Literal["one", "qkv", "gate_up"]
ReadSlice = Callable[[str, tuple[slice, ...]], Tensor]

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Rule:
    """How one parameter of megatron is made of Hugging Face's."""

    hf_names: tuple[str, ...]  # may hold {layer}, numbered from 0 over the whole model
    shard_dim: int | None  # the axis cut over tensor-parallel ranks; None: every rank holds all of it
    fusion: Fusion = "one"


_NORM_1 = Rule(("model.layers.{layer}.input_layernorm.weight",), None)
_NORM_2 = Rule(("model.layers.{layer}.post_attention_layernorm.weight",), None)

LAYER_RULES = {
    "input_layernorm.weight": _NORM_1,
    "self_attention.linear_qkv.layer_norm_weight": _NORM_1,  # Transformer Engine's spelling
    "self_attention.linear_qkv.weight": Rule(
        tuple(f"model.layers.{{layer}}.self_attn.{x}_proj.weight" for x in "qkv"), 0, "qkv"
    ),
    "self_attention.linear_proj.weight": Rule(("model.layers.{layer}.self_attn.o_proj.weight",), 1),
    "pre_mlp_layernorm.weight": _NORM_2,
    "mlp.linear_fc1.layer_norm_weight": _NORM_2,  # Transformer Engine's spelling
    "mlp.linear_fc1.weight": Rule(
        ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"), 0, "gate_up"
    ),
    "mlp.linear_fc2.weight": Rule(("model.layers.{layer}.mlp.down_proj.weight",), 1),
}

OTHER_RULES = {
    "embedding.word_embeddings.weight": Rule((EMBEDDING,), 0),
    "decoder.final_layernorm.weight": Rule(("model.norm.weight",), None),
    "output_layer.weight": Rule(("lm_head.weight",), 0),
    "output_layer.score.weight": Rule(("score.weight",), None),
    "output_layer.group_head.weight": Rule(("group_head.weight",), None),
}

HEAD_NAMES = ("score.weight", "group_head.weight")


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of this rank."""

    param_name: str  # as in model.named_parameters()
    hf_names: tuple[str, ...]
    rule: Rule
    local_shape: tuple[int, ...]
    is_copy: bool
    """The tied embedding's second copy, on the last pipeline stage: read, not written."""


class WeightMap:
    """The entries of one pipeline stage of one model, and the two directions."""

    def __init__(self, spec: LlamaSpec, model: GPTModel, layout: ParallelLayout) -> None:
        self.spec, self.model = spec, model
        self.layout = layout
        first_layer = spec.layers_of(layout.pp_rank, layout.pp_size).start
        tied = model.share_embeddings_and_output_weights
        self.entries = [
            _make_entry(name, tuple(param.shape), first_layer, tied) for name, param in model.named_parameters()
        ]
        self._by_name = {entry.param_name: entry for entry in self.entries}

    def full_shape(self, entry: Entry) -> tuple[tuple[int, ...], ...]:
        """Shapes of the entry's Hugging Face tensors, in the order of `hf_names`."""
        dim, tp_size = entry.rule.shard_dim, self.layout.tp_size
        shapes = [list(shape) for shape in self._part_shapes(entry)]
        for shape in shapes:
            if dim is not None:
                shape[dim] *= tp_size
            if self._is_vocab(entry):
                shape[0] = self.spec.vocab_size
        return tuple(tuple(shape) for shape in shapes)

    def to_full(self, param_name: str, local: Tensor) -> dict[str, Tensor]:
        """Hugging Face's tensors, bit for bit, of one parameter-shaped tensor; all tensor-parallel ranks call it
        together, and all get the result."""
        entry = self._by_name[param_name]
        assert tuple(local.shape) == entry.local_shape, (param_name, local.shape, entry.local_shape)
        full = {}
        for name, part in zip(entry.hf_names, self._split(entry, local), strict=True):
            dim = entry.rule.shard_dim
            whole = part.contiguous() if dim is None else concat_over_tp(part.contiguous(), dim, self.layout)
            full[name] = whole[: self.spec.vocab_size] if self._is_vocab(entry) else whole
        return full

    def to_local(self, param_name: str, read: ReadSlice) -> Tensor:
        """This rank's part, from `read(hf_name, slices)`; rows that pad the vocabulary are zero."""
        entry = self._by_name[param_name]
        parts = []
        for name, shape in zip(entry.hf_names, self._part_shapes(entry), strict=True):
            part = read(name, self._local_slices(entry, shape))
            if part.shape[0] < shape[0]:
                part = torch.cat([part, part.new_zeros(shape[0] - part.shape[0], *shape[1:])])
            parts.append(part)
        return self._fuse(entry, parts)

    def _is_vocab(self, entry: Entry) -> bool:
        return entry.hf_names[0] in (EMBEDDING, "lm_head.weight")

    def _local_slices(self, entry: Entry, part_shape: tuple[int, ...]) -> tuple[slice, ...]:
        slices = [slice(0, size) for size in part_shape]
        dim = entry.rule.shard_dim
        if dim is not None:
            start = self.layout.tp_rank * part_shape[dim]
            stop = start + part_shape[dim]
            slices[dim] = slice(start, min(stop, self.spec.vocab_size) if self._is_vocab(entry) else stop)
        return tuple(slices)

    def _part_shapes(self, entry: Entry) -> tuple[tuple[int, ...], ...]:
        rows, rest = entry.local_shape[0], entry.local_shape[1:]
        if entry.rule.fusion == "gate_up":
            return ((rows // 2, *rest),) * 2
        if entry.rule.fusion == "qkv":
            kv_rows = rows // (self._heads_per_kv + 2)
            return ((self._heads_per_kv * kv_rows, *rest), (kv_rows, *rest), (kv_rows, *rest))
        return (entry.local_shape,)

    @property
    def _heads_per_kv(self) -> int:
        return self.spec.num_heads // self.spec.num_kv_heads

    def _split(self, entry: Entry, local: Tensor) -> list[Tensor]:
        if entry.rule.fusion == "gate_up":
            return list(local.chunk(2))
        if entry.rule.fusion == "qkv":  # megatron keeps a key-value head after the query heads that read it
            shape = (-1, self._heads_per_kv + 2, self.spec.head_dim, *local.shape[1:])
            heads = local.reshape(shape).split([self._heads_per_kv, 1, 1], dim=1)
            return [part.flatten(0, 2) for part in heads]
        return [local]

    def _fuse(self, entry: Entry, parts: list[Tensor]) -> Tensor:
        if entry.rule.fusion == "gate_up":
            return torch.cat(parts)
        if entry.rule.fusion == "qkv":
            counts = (self._heads_per_kv, 1, 1)
            heads = [
                part.reshape(-1, count, self.spec.head_dim, *part.shape[1:])
                for part, count in zip(parts, counts, strict=True)
            ]
            return torch.cat(heads, dim=1).flatten(0, 2)
        return parts[0]


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
        if entry.hf_names[0] in HEAD_NAMES and entry.hf_names[0] not in tensors:
            absent.append(entry.hf_names[0])
            continue
        for name, shape in zip(entry.hf_names, weights.full_shape(entry), strict=True):
            tensors.check_shape(name, shape)
        params[entry.param_name].copy_(weights.to_local(entry.param_name, tensors.read))
    return absent


def _make_entry(param_name: str, local_shape: tuple[int, ...], first_layer: int, tied: bool) -> Entry:
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", param_name)
    rule = OTHER_RULES[param_name] if match is None else LAYER_RULES[match[2]]
    is_copy = tied and param_name == "output_layer.weight"
    if is_copy:
        rule = OTHER_RULES["embedding.word_embeddings.weight"]
    layer = first_layer + int(match[1]) if match else 0
    names = tuple(name.format(layer=layer) for name in rule.hf_names)
    return Entry(param_name, names, rule, local_shape, is_copy)
