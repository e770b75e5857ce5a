"""How far each group's reward can be followed: what a trusted number does when the reward picks the best of n.

The best of n responses of a policy is what an optimised policy would give, without training one. It lies

    KL(n) = log n - (n - 1) / n    nats

or less from that policy (Beirami et al. 2024, arXiv 2401.01879), and its trusted mean rises and falls with n as that of
a trained policy does with its KL (Gao et al. 2023, arXiv 2210.10760). Where it is highest, the reward should be
followed no further; where groups differ in that, one KL coefficient for all of them costs something.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_gil.evaluation.cluster_bootstrap import DRAWS, expanded_interval, resampled_sums
from megatron_gil.evaluation.statistics import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The responses to one prompt: what the reward and whoever is trusted say of each."""

    group: str
    scores: Sequence[float]
    trusted: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """Of one group's prompts. Entry i of a curve is of n = i + 1."""

    num_prompts: int
    curve: tuple[Estimate, ...]
    """Mean trusted number of the response that scores highest of n, with its interval over prompts."""
    best_n: int
    """Where the curve is highest: the reward helps up to there."""
    best_n_low: int
    """Of 95 % of resampled prompts, where theirs is highest at the least; of one prompt, any n ..."""
    best_n_high: int
    """... and at the most. The end of the curve is a limit of the data, not of the reward."""

    @property
    def best_kl(self) -> float:
        return kl_of_best_of(self.best_n)


@dataclass(frozen=True, slots=True, kw_only=True)
class KlPrice:
    """What one KL for all groups costs."""

    groups: Mapping[str, BestOfN]
    shared_n: int
    """The n that is best if it must be the same for all prompts."""
    price: Estimate
    """Trusted mean over all prompts with each group at its own best n, less that at shared_n. Never negative; its
    interval is that of resampled prompts, whose best n are their own."""


def kl_of_best_of(n: int) -> float:
    """log n - (n - 1) / n, nats: an upper bound that is close for distinct responses."""
    return math.log(n) - (n - 1) / n


def trusted_of_best(scores: Sequence[float], trusted: Sequence[float], n: int) -> float:
    """Expected trusted number of the one that scores highest of n, drawn from the responses without replacement; of
    equal scores each is as likely."""
    return float(_weights_by_rank(len(scores), n) @ _by_rising_score(scores, trusted))


def kl_price(prompts: Sequence[Candidates], *, draws: int = DRAWS, seed: int = 0) -> KlPrice:
    """The curves reach as far as the prompt with the fewest responses. Prompts are resampled, all responses of one
    together."""
    assert prompts
    largest = min(len(prompt.scores) for prompt in prompts)
    curves = np.array([_curve(prompt, largest) for prompt in prompts])  # [prompts, n]
    names = list(dict.fromkeys(prompt.group for prompt in prompts))
    member = np.array([[prompt.group == name for name in names] for prompt in prompts], dtype=np.float64)
    parts = curves[:, None, :] * member[:, :, None]  # [prompts, groups, n]
    drawn = resampled_sums(np.arange(len(prompts)), {"sums": parts, "counts": member}, draws=draws, seed=seed)
    sums, counts = parts.sum(0), member.sum(0)
    with np.errstate(invalid="ignore"):  # a draw may miss a group
        means = drawn["sums"] / drawn["counts"][:, :, None]
    prices = _price(np.concatenate([sums[None], drawn["sums"]]) / len(prompts))
    return KlPrice(
        groups={name: _of_group(sums[g] / counts[g], means[:, g], int(counts[g])) for g, name in enumerate(names)},
        shared_n=int(sums.sum(0).argmax()) + 1,
        price=expanded_interval(float(prices[0]), prices[1:], len(prompts)),
    )


def _of_group(curve: np.ndarray, resampled: np.ndarray, num_prompts: int) -> BestOfN:
    found = resampled[np.isfinite(resampled).all(1)]
    low, high = 0, len(curve) - 1
    if num_prompts > 1 and len(found):  # else their spread is unknown
        low, high = np.quantile(found.argmax(1), [0.025, 0.975], method="nearest")
    return BestOfN(
        num_prompts=num_prompts,
        curve=tuple(expanded_interval(float(v), found[:, i], num_prompts) for i, v in enumerate(curve)),
        best_n=int(curve.argmax()) + 1,
        best_n_low=int(low) + 1,
        best_n_high=int(high) + 1,
    )


def _price(means: np.ndarray) -> np.ndarray:
    """[draws] from the means over all prompts of each group's part [draws, groups, n]."""
    return means.max(2).sum(1) - means.sum(1).max(1)


def _curve(prompt: Candidates, largest: int) -> np.ndarray:
    """[largest] expected trusted number of the best of 1, 2, ..."""
    values = _by_rising_score(prompt.scores, prompt.trusted)
    above = values - values[0]  # so that of equal scores the curve is flat to the last bit, and n = 1 the best
    return values[0] + np.array([_weights_by_rank(len(values), n) @ above for n in range(1, largest + 1)])


@functools.cache  # most prompts have as many responses
def _weights_by_rank(count: int, n: int) -> np.ndarray:
    """[count] probability that the response of each rank, from the lowest score up, is the highest of n drawn."""
    return np.array([math.comb(rank, n - 1) for rank in range(count)], dtype=np.float64) / math.comb(count, n)


def _by_rising_score(scores: Sequence[float], trusted: Sequence[float]) -> np.ndarray:
    """Trusted numbers in the order of the scores; responses of equal score all have the mean of theirs."""
    _, rank, ties = np.unique(np.asarray(scores), return_inverse=True, return_counts=True)
    means = np.bincount(rank, weights=np.asarray(trusted, dtype=np.float64)) / ties
    return np.repeat(means, ties)
