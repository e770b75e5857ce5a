"""Sums, means and moments over what a mask picks, over all ranks where an `all_sum` is handed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_gil.types import AllSum

_TINY = 1e-8
"""Added to a variance, and the least standard deviation divided by: constant inputs come out as 0, not NaN."""


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum of x where the mask is True. What lies outside, NaN included, reaches neither the sum nor its gradient."""
    return torch.where(mask, x, 0).sum()


@torch.no_grad()
def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, all_sum: AllSum) -> Float[Tensor, ""]:
    """Mean over the masked entries of all ranks, float64, equal on every rank; 0 where no rank has an entry.

    For statistics only: no gradient passes.
    """
    total, count = all_sum(torch.stack([masked_sum(x.double(), mask), mask.sum().double()]))
    return total / count.clamp(min=1)


@torch.no_grad()
def whiten(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, all_sum: AllSum) -> Float[Tensor, "*shape"]:
    """(x - mean) / sqrt(variance + 1e-8) with the population moments over all ranks; 0 outside the mask."""
    mean = masked_mean(x, mask, all_sum=all_sum)
    centred = x.double() - mean
    variance = masked_mean(centred.square(), mask, all_sum=all_sum)
    whitened = centred * torch.rsqrt(variance + _TINY)
    return torch.where(mask, whitened, 0).to(x.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreMoments:
    """Running moments of all scores seen so far on all ranks; three plain floats, so a checkpoint can hold it."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0
    """Sum of squared deviations from `mean`."""

    @torch.no_grad()
    def merge(self, scores: Float[Tensor, " batch"], *, all_sum: AllSum) -> ScoreMoments:
        """The moments with every rank's `scores` added (the merge of Chan, Golub and LeVeque 1979), in float64.

        Equal on every rank for any cut of the scores into ranks. At least one rank must bring a score. Scores of which
        one is NaN or infinite leave the moments as they are: they would never recover.
        """
        scores = scores.double()
        total, count = all_sum(torch.stack([scores.sum(), scores.new_full((), scores.numel())])).tolist()
        mean = total / count
        m2 = all_sum((scores - mean).square().sum()).item()
        if not math.isfinite(m2):
            return self
        delta = mean - self.mean
        merged_count = self.count + count
        return ScoreMoments(
            count=merged_count,
            mean=self.mean + delta * count / merged_count,
            m2=self.m2 + m2 + delta * delta * self.count * count / merged_count,
        )

    @property
    def std(self) -> float:
        """Population standard deviation (divides by count, not count - 1); 1 before the second score."""
        return (self.m2 / self.count) ** 0.5 if self.count > 1 else 1.0

    def normalize(self, scores: Float[Tensor, " batch"], *, clip: float) -> Float[Tensor, " batch"]:
        """(score - mean) / std, held within [-clip, clip]; clip 0 switches the bound off."""
        normalized = (scores.double() - self.mean) / max(self.std, _TINY)
        return (normalized.clamp(-clip, clip) if clip > 0 else normalized).to(scores.dtype)
