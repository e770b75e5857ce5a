"""Per-token estimators of KL(policy || ref_policy) from tokens the policy sampled.

With r = pi_ref / pi of the sampled token; names after http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def k1(log_probs: Float[Tensor, "batch pos"], ref_log_probs: Float[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """-log r: unbiased, of either sign, nats."""
    return log_probs - ref_log_probs


def k3(log_probs: Float[Tensor, "batch pos"], ref_log_probs: Float[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """(r - 1) - log r: unbiased and never negative."""
    log_r = ref_log_probs - log_probs
    return torch.expm1(log_r) - log_r
