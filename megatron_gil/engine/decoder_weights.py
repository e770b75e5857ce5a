"""All weights of a model as plain tensors, in the order in which decoding reads them.

Without a pipeline they are views of the trainer's own. With one, each pipeline rank receives the other ranks' parts,
layer by layer, so that every rank can decode rows of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_gil.engine.megatron import MegatronModel
from megatron_gil.parallel.pipeline import share_from_pp_stage


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Of this tensor-parallel rank. Matrices are [in, out]: views of the trainer's [out, in]."""

    attention_norm: Tensor  # [H]
    qkv: Tensor  # [H, G * (R + 2) * D]: each key-value head after the query heads that read it, the value last
    proj: Tensor  # [G * R * D, H]
    mlp_norm: Tensor  # [H]
    gate_up: Tensor  # [H, 2 * F]
    down: Tensor  # [F, H]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    embedding: Tensor  # [V / tp, H], rows that pad the vocabulary included
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [H]
    head: Tensor  # [H, V / tp]


_LAYER_NAMES = {
    "attention_norm": ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    "qkv": ("self_attention.linear_qkv.weight",),
    "proj": ("self_attention.linear_proj.weight",),
    "mlp_norm": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    "gate_up": ("mlp.linear_fc1.weight",),
    "down": ("mlp.linear_fc2.weight",),
}
"""megatron's names: the local layer's, and Transformer Engine's where it has another."""


def collect_weights(model: MegatronModel) -> DecoderWeights:
    """The weights as they are now. Collective over pipeline ranks, which hold all of them after it."""
    spec, layout = model.spec, model.layout
    own = {name: parameter.detach() for name, parameter in model.module.named_parameters()}
    tied = spec.tied and model.head == "lm"
    layers = []
    for pp_rank in range(layout.pp_size):
        for place in range(len(spec.layers_of(pp_rank, layout.pp_size))):
            layers.append(_layer(own, place, pp_rank, model))
    table = (model.module.vocab_size // layout.tp_size, spec.hidden_size)
    last = layout.pp_size - 1
    embedding = _share(own, ("embedding.word_embeddings.weight",), 0, model, lambda: table)
    head = embedding if tied else _share(own, ("output_layer.weight",), last, model, lambda: table)
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(layers),
        final_norm=_share(own, ("decoder.final_layernorm.weight",), last, model, lambda: (spec.hidden_size,)),
        head=head.t(),
    )


def _layer(own: dict[str, Tensor], place: int, pp_rank: int, model: MegatronModel) -> LayerWeights:
    """Layer number `place` of one pipeline rank, the shapes of which are those of this rank's first."""
    found = {}
    for field, names in _LAYER_NAMES.items():
        like = _find(own, tuple(f"decoder.layers.0.{name}" for name in names))
        wanted = tuple(f"decoder.layers.{place}.{name}" for name in names)
        weight = _share(own, wanted, pp_rank, model, lambda like=like: tuple(like.shape))
        found[field] = weight.t() if weight.ndim == 2 else weight
    return LayerWeights(**found)


def _share(
    own: dict[str, Tensor],
    names: tuple[str, ...],
    pp_rank: int,
    model: MegatronModel,
    shape: Callable[[], tuple[int, ...]],
) -> Tensor:
    layout = model.layout
    mine = _find(own, names) if layout.pp_rank == pp_rank else None
    return share_from_pp_stage(mine, shape(), model.dtype, pp_rank, layout)


def _find(own: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    return next(own[name] for name in names if name in own)
