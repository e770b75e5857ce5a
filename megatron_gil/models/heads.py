"""Output layers that hold their weights and compute nothing: which positions are read is known only to the reader."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor


class ScalarHead(torch.nn.Module):
    """Linear(H, 1), and beside it Linear(H, M) with more than one group; the same on every tensor-parallel rank.

    Weights start at zero; a checkpoint or the caller fills them.
    """

    def __init__(self, hidden_size: int, num_groups: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.score = _zero_linear(hidden_size, 1, dtype, device)
        self.group_head = _zero_linear(hidden_size, num_groups, dtype, device) if num_groups > 1 else None

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hand_on(hidden)


def hand_on(hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
    """The forward of every output layer, called as megatron's: the hidden states, and no bias."""
    return hidden, None


def output_weight(model: GPTModel) -> Tensor:
    """[V / tp, H], on the last stage of a language model."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    weight = model.output_layer.weight
    assert weight is not None
    return weight


def _zero_linear(in_size: int, out_size: int, dtype: torch.dtype, device: torch.device) -> torch.nn.Linear:
    linear = torch.nn.Linear(in_size, out_size, bias=False, dtype=dtype, device=device)
    torch.nn.init.zeros_(linear.weight)
    return linear
