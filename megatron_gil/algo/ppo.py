"""The clipped losses of PPO (arXiv 1707.06347) as sums over response tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_gil.algo import kl
from megatron_gil.algo.masked import masked_mean, masked_sum
from megatron_gil.types import AllSum, LossSum


def policy_loss(
    log_probs: Float[Tensor, "batch pos"],
    old_log_probs: Float[Tensor, "batch pos"],
    advantages: Float[Tensor, "batch pos"],
    response_mask: Bool[Tensor, "batch pos"],
    *,
    clip_range: float,
) -> LossSum:
    """- sum_it min(rho A, clip(rho, 1 - clip_range, 1 + clip_range) A), rho = pi / pi_old of the chosen token.

    `advantages` come with the invariance weight folded in: omega_i A_it. Metrics: policy/loss, policy/clip_fraction
    (tokens whose clipped term is the smaller, so that they carry no gradient), policy/approx_kl (KL(pi_old || pi),
    k3, nats) and policy/ratio (rho).
    """
    # Masked before exp: the log-ratio of padding is arbitrary, and 0 * inf in the backward pass is NaN.
    log_ratio = torch.where(response_mask, log_probs - old_log_probs, 0)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    total = -masked_sum(torch.minimum(unclipped, clipped), response_mask)
    with torch.no_grad():
        metrics = {
            "policy/loss": total.detach(),
            "policy/clip_fraction": masked_sum((clipped < unclipped).to(ratio.dtype), response_mask),
            "policy/approx_kl": masked_sum(kl.k3(torch.zeros_like(log_ratio), log_ratio), response_mask),
            "policy/ratio": masked_sum(ratio, response_mask),
        }
    return LossSum(total=total, metrics=metrics)


def value_loss(
    values: Float[Tensor, "batch pos"],
    old_values: Float[Tensor, "batch pos"],
    returns: Float[Tensor, "batch pos"],
    response_mask: Bool[Tensor, "batch pos"],
    *,
    value_clip_range: float,
) -> LossSum:
    """sum_it max((V - R)^2, (V_clip - R)^2) / 2, V_clip = V_old + clip(V - V_old, +-value_clip_range).

    Metrics: critic/value_loss and critic/clip_fraction (tokens whose clipped error is the larger).
    """
    clipped_values = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    unclipped = (values - returns).square()
    clipped = (clipped_values - returns).square()
    total = masked_sum(torch.maximum(unclipped, clipped), response_mask) / 2
    metrics = {
        "critic/value_loss": total.detach(),
        "critic/clip_fraction": masked_sum((clipped > unclipped).to(total.dtype), response_mask),
    }
    return LossSum(total=total, metrics=metrics)


@torch.no_grad()
def explained_variance(
    values: Float[Tensor, "batch pos"],
    returns: Float[Tensor, "batch pos"],
    response_mask: Bool[Tensor, "batch pos"],
    *,
    all_sum: AllSum,
) -> Float[Tensor, ""]:
    """1 - Var(returns - values) / Var(returns) over the response tokens of all ranks, float64.

    1 is a perfect critic, 0 one no better than the mean, below 0 worse; 0 if the returns are constant.
    """

    def variance(x: Tensor) -> Tensor:
        centred = x - masked_mean(x, response_mask, all_sum=all_sum)
        return masked_mean(centred.square(), response_mask, all_sum=all_sum)

    total, unexplained = variance(returns.double()), variance(returns.double() - values.double())
    return torch.where(total > 0, 1 - unexplained / total, 0)
