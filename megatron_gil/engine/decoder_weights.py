"""All weights of a model as plain tensors, in the order in which decoding reads them.

Without a pipeline they are views of the trainer's own. With one, each pipeline rank receives the other ranks' parts,
layer by layer, so that every rank can decode rows of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_gil.engine.megatron import MegatronModel
from megatron_gil.models.weight_table import Weight
from megatron_gil.parallel.pipeline import share_from_pp_stage


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Of this tensor-parallel rank, under the names of the family's table of weights. Matrices are [in, out]: views of
    the trainer's [out, in]."""

    attention_norm: Tensor  # [H]
    qkv: Tensor  # [H, G * (R + 2) * D]: each key-value head after the query heads that read it, the value last
    qkv_bias: Tensor | None = None  # [G * (R + 2) * D], in the order of qkv's columns
    query_norm: Tensor | None = None  # [D]
    key_norm: Tensor | None = None  # [D]
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


def collect_weights(model: MegatronModel) -> DecoderWeights:
    """The weights as they are now. Collective over pipeline ranks, which hold all of them after it."""
    spec, layout, table = model.spec, model.layout, model.spec.weights(model.head)
    own = {name: parameter.detach() for name, parameter in model.module.named_parameters()}
    layers = []
    for pp_rank in range(layout.pp_size):
        for place in range(len(spec.layers_of(pp_rank, layout.pp_size))):
            found = {w.name: _share(own, w, pp_rank, model, layer=place) for w in table.layer}
            layers.append(LayerWeights(**{name: w.t() if w.ndim == 2 else w for name, w in found.items()}))
    ends = {w.name: _share(own, w, 0, model) for w in table.first}
    # A tied head is the embedding, which every rank has by now.
    ends |= {w.name: _share(own, w, layout.pp_size - 1, model) for w in table.last if not w.is_copy}
    return DecoderWeights(
        embedding=ends["embedding"],
        layers=tuple(layers),
        final_norm=ends["final_norm"],
        head=ends.get("head", ends["embedding"]).t(),
    )


def _share(own: dict[str, Tensor], weight: Weight, pp_rank: int, model: MegatronModel, layer: int = 0) -> Tensor:
    """One weight of a pipeline rank, on all of them. layer: its number on that rank."""
    layout = model.layout
    names = [name.format(layer=layer) for name in weight.param_names]
    mine = next(own[name] for name in names if name in own) if layout.pp_rank == pp_rank else None
    return share_from_pp_stage(mine, weight.local_shape(layout.tp_size), model.dtype, pp_rank, layout)
