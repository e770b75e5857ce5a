"""Supervised fine-tuning: the negative log-likelihood of demonstrations."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from megatron_gil.algo.masked import masked_sum
from megatron_gil.types import LossSum


def token_nll(log_probs: Float[Tensor, "batch pos"], response_mask: Bool[Tensor, "batch pos"]) -> LossSum:
    """- sum of log pi over the response tokens, nats. Metric: sft/loss."""
    total = -masked_sum(log_probs, response_mask)
    return LossSum(total=total, metrics={"sft/loss": total.detach()})
