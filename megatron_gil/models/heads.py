"""Scalar heads in the place of the output layer: reward score, critic's value, group logits."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_gil.parallel.layout import ParallelLayout


class ScalarHead(torch.nn.Module):
    """Linear(H, 1), and beside it Linear(H, M) with more than one group; the same on every tensor-parallel rank.

    Weights start at zero; a checkpoint or the caller fills them.
    """

    def __init__(self, hidden_size: int, num_groups: int, dtype: torch.dtype, layout: ParallelLayout) -> None:
        super().__init__()
        self.tp_pg, self.num_groups = layout.tp_pg, num_groups
        self.sequence_parallel = layout.sequence_parallel  # set_model_to_sequence_parallel switches it by this name
        self.score = _zero_linear(hidden_size, 1, dtype, layout.device)
        self.group_head = _zero_linear(hidden_size, num_groups, dtype, layout.device) if num_groups > 1 else None

    def forward(
        self,
        hidden: Tensor,  # [T, B, H], or [T / tp, B, H] under sequence parallelism
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        """[T, B, 1] or [T, B, 1 + M]: the score or value, then the group logits. Called as megatron's output layer."""
        if self.sequence_parallel:
            # Every rank computes the whole loss and keeps its part of the gradient; a sum would count it tp times.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.tp_pg)
        scores = self.score(hidden)
        if self.group_head is None:
            return scores, None
        return torch.cat([scores, self.group_head(hidden)], dim=-1), None


def _zero_linear(in_size: int, out_size: int, dtype: torch.dtype, device: torch.device) -> torch.nn.Linear:
    linear = torch.nn.Linear(in_size, out_size, bias=False, dtype=dtype, device=device)
    torch.nn.init.zeros_(linear.weight)
    return linear
