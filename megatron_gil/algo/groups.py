"""Group-invariant learning (arXiv 2310.11971): what each data group earns, as weights for policy and classifier.

Trajectory i of N, over all data-parallel ranks, belongs to group g of M with probability w_ig (its row of `probs`) and
earns R_i (its entry of `returns`):

    D_g = sum_i w_ig    J_g = sum_i w_ig R_i / D_g    Jbar = mean_g J_g    R_var = mean_g (J_g - Jbar)^2

The policy maximises E[R] - invariance_coef * R_var, the classifier maximises R_var. Both gradients are settled once
per rollout as constants, omega [B] and c [B, M]: no function but `classifier_loss` passes a gradient, and no collective
lies inside a loss. A group whose mass D_g is too small to speak of (`GroupStats.counts` False) takes no part; M in the
formulas below is the number of groups that do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_gil.types import AllSum, GroupStats


@torch.no_grad()
def group_statistics(
    probs: Float[Tensor, "batch group"],
    returns: Float[Tensor, " batch"],
    *,
    all_sum: AllSum,
    min_group_mass: float = 0.02,
) -> GroupStats:
    """D_g, J_g, Jbar and R_var over all ranks: one sum of 2M + 1 float64 numbers, so any cut into ranks agrees.

    A group counts if D_g >= max(min_group_mass * N, 1). R_var is the population variance (torch.var's default is twice
    that at M = 2).

    `returns` never holds whitened advantages: whitening centres the gap between groups away. With
    `gil.group_value: weighted_log_prob` it holds the value the paper prints, sum_t log pi(a_t | s_t) R_t of a
    trajectory. log pi is negative, so that value ranks groups that earn positive returns backwards, and the penalty
    made from it widens the gap between their returns instead of closing it: for study only.
    """
    weights, num_groups = probs.double(), probs.shape[1]
    weighted_returns = (weights * returns.double()[:, None]).sum(dim=0)
    num_rows = weights.new_full((1,), len(weights))
    summed = all_sum(torch.cat([weighted_returns, weights.sum(dim=0), num_rows]))
    weighted_returns, mass, num_rows = summed.split([num_groups, num_groups, 1])

    group_return = torch.where(mass > 0, weighted_returns / mass, 0)
    counts = mass >= (min_group_mass * num_rows).clamp(min=1)
    num_counted = counts.sum().clamp(min=1)
    mean_return = torch.where(counts, group_return, 0).sum() / num_counted
    variance = torch.where(counts, (group_return - mean_return).square(), 0).sum() / num_counted
    scalars = torch.stack([num_rows[0], mean_return, variance]).tolist()  # read by the host at once
    return GroupStats(
        num_rows=scalars[0],
        mass=mass,
        group_return=group_return,
        mean_return=scalars[1],
        variance=scalars[2],
        counts=counts,
    )


def _variance_slopes(stats: GroupStats) -> Float[Tensor, " group"]:
    """(2/M)(J_g - Jbar) / D_g, the derivative of R_var by sum_i w_ig R_i; 0 for a group that does not count.

    Exactly 0 everywhere if fewer than two groups count.
    """
    slopes = 2 * (stats.group_return - stats.mean_return) / (stats.counts.sum() * stats.mass)
    return torch.where(stats.counts, slopes, 0)


@torch.no_grad()
def invariance_weights(
    probs: Float[Tensor, "batch group"],
    stats: GroupStats,
    *,
    invariance_coef: float,
    weight_floor: float | None = None,
) -> Float[Tensor, " batch"]:
    """omega_i = 1 - invariance_coef * N * sum_g (2/M)(J_g - Jbar) w_ig / D_g, to multiply trajectory i's advantages by.

    Then mean_i omega_i A_i grad log pi_i is the gradient of E[R] - invariance_coef * R_var with the masses held fixed.
    omega averages 1 over all ranks (unless `weight_floor`, a lower bound of at most 1, cuts some), may be negative, and
    is exactly 1.0 where invariance_coef is 0 or fewer than two groups count.
    """
    penalty = stats.num_rows * (probs.double() * _variance_slopes(stats)).sum(dim=1)
    weights = 1 - invariance_coef * penalty
    return (weights if weight_floor is None else weights.clamp(min=weight_floor)).to(probs.dtype)


@torch.no_grad()
def classifier_coefs(
    probs: Float[Tensor, "batch group"],
    returns: Float[Tensor, " batch"],
    stats: GroupStats,
    *,
    balance_coef: float = 0.0,
) -> Float[Tensor, "batch group"]:
    """c_ig = (2/M)(J_g - Jbar)(R_i - J_g) / D_g, the derivative of R_var by w_ig; 0 for a group that does not count.

    `returns` and `probs` are those `stats` was made from. `balance_coef` adds the slope of
    - balance_coef * KL(mean_i w_i || uniform), which pulls on every group, also on one too small to count. Its part
    that is the same for all g is left out: a softmax does not feel it.
    """
    coefs = _variance_slopes(stats) * (returns.double()[:, None] - stats.group_return)
    shares = (stats.mass / stats.num_rows).clamp(min=torch.finfo(torch.float64).tiny)
    coefs = coefs - balance_coef * (shares * len(shares)).log() / stats.num_rows
    return coefs.to(probs.dtype)


def classifier_loss(
    group_logits: Float[Tensor, "batch group"], coefs: Float[Tensor, "batch group"]
) -> Float[Tensor, ""]:
    """- sum_i sum_g c_ig p_phi(g | tau_i): its gradient, at the phi that gave c, is that of - R_var.

    The softmax is taken in float32 at least. The sum belongs to the global batch as it is: where an engine divides the
    loss by a count, multiply by that count first. Equal logits, such as those of a zero head, are a stationary point:
    every J_g is the same, c is 0 and phi never moves. Do not start there.
    """
    probs = group_logits.to(torch.promote_types(group_logits.dtype, torch.float32)).softmax(dim=1)
    return -(coefs * probs).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class HighGroup:
    """Which group performs best, by a moving average of the groups' mean scores; plain numbers, for a checkpoint."""

    ema: tuple[float | None, ...]
    """Moving average of each group's mean score; None until the group first counts."""
    index: int
    """The group with the highest average; a tie leaves it where it is."""

    @classmethod
    def start(cls, num_groups: int) -> HighGroup:
        """Before any score: group 0, which the classifier's head starts as the high one."""
        return cls(ema=(None,) * num_groups, index=0)

    def update(
        self, group_scores: Float[Tensor, " group"], counts: Bool[Tensor, " group"], *, decay: float
    ) -> HighGroup:
        """ema_g = decay ema_g + (1 - decay) score_g; a group's first score is taken as it is.

        `group_scores` are mean scores over all ranks (`group_statistics` of the scores): the score and not the shaped
        return, which the adaptive KL penalty lowers for the high group. A group that does not count keeps its average,
        and so does one whose score is not finite.
        """
        ema = tuple(
            old
            if not takes_part or not math.isfinite(score)
            else score
            if old is None
            else decay * old + (1 - decay) * score
            for old, score, takes_part in zip(self.ema, group_scores.tolist(), counts.tolist(), strict=True)
        )
        known = [average for average in ema if average is not None]
        if not known or ema[self.index] == max(known):
            return HighGroup(ema=ema, index=self.index)
        return HighGroup(ema=ema, index=ema.index(max(known)))
