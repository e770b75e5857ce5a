"""KL(policy || ref_policy): per-token estimators from tokens the policy sampled, and a controller that holds a KL near
its target.

With r = pi_ref / pi of the sampled token; names after http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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


MAX_ERROR, GAIN = 0.5, 0.2
"""A controller's factor moves by at most a tenth an iteration (Ziegler et al. have 0.2 and 0.1, for longer runs) ..."""
MAX_FACTOR = 20.0
"""... between 1 / this and this, so that after a long time on one side of its target it comes back soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KlController:
    """A factor on the KL coefficient that rises while the KL is above its target and falls while it is below
    (arXiv 1909.08593, section 2.2); plain numbers, for a checkpoint."""

    target: float
    """Nats a response, above 0."""
    factor: float = 1.0

    def update(self, kl: float) -> KlController:
        """factor *= 1 + GAIN * error, where error = kl / target - 1, clipped to MAX_ERROR on both sides of 0. A KL that
        is not finite changes nothing."""
        if not math.isfinite(kl):
            return self
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        factor = self.factor * (1 + GAIN * error)
        return replace(self, factor=min(max(factor, 1 / MAX_FACTOR), MAX_FACTOR))
