"""How far scores and numbers that somebody trusts go together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_gil.evaluation.cluster_bootstrap import DRAWS, expanded_interval, number_clusters, resampled_times
from megatron_gil.evaluation.statistics import Estimate

LEAST_ROWS = 3
"""Two rows always correlate by 1 or -1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """95 % intervals, by resampling prompts with all their rows. NaN where one of the two numbers does not vary, and of
    fewer than LEAST_ROWS rows."""

    num_rows: int
    num_prompts: int
    spearman: Estimate
    """Of ranks, equal numbers sharing their mean rank; ranks are taken anew in each draw."""
    pearson: Estimate


def correlate(
    scores: Sequence[float], trusted: Sequence[float], prompts: Sequence[str], *, draws: int = DRAWS, seed: int = 0
) -> Correlation:
    """Of at least one row."""
    x, y = (_standardised(np.asarray(values, dtype=np.float64)) for values in (scores, trusted))
    clusters = number_clusters(prompts)
    num_prompts, once = int(clusters.max()) + 1, np.ones((1, len(x)))
    parts = [block[:, clusters] for block in resampled_times(num_prompts, len(x), draws=draws, seed=seed)]

    def estimate(ranked: bool) -> Estimate:
        if len(x) < LEAST_ROWS:
            return Estimate(value=math.nan, low=math.nan, high=math.nan)
        found = [_correlation(x, y, times, ranked=ranked) for times in (once, *parts)]
        return expanded_interval(float(found[0][0]), np.concatenate(found[1:]), num_prompts)

    return Correlation(
        num_rows=len(x), num_prompts=num_prompts, spearman=estimate(ranked=True), pearson=estimate(ranked=False)
    )


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """NaN where one of the two does not vary."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (x, y))
    return float(_correlation(a, b, np.ones((1, len(x))), ranked=True)[0])


def _standardised(values: np.ndarray) -> np.ndarray:
    """Of mean 0 and standard deviation 1; all 0 where they are equal."""
    spread = values.std()
    return (values - values.mean()) / spread if np.ptp(values) > 0 and spread > 0 else np.zeros_like(values)


def _correlation(x: np.ndarray, y: np.ndarray, times: np.ndarray, *, ranked: bool) -> np.ndarray:
    """[draws] Pearson's correlation of rows that count `times` [draws, n] times, or of their ranks among those."""
    a, b = (_ranks(v, times) if ranked else np.broadcast_to(v, times.shape) for v in (x, y))
    count = times.sum(1, keepdims=True)
    a, b = (v - (times * v).sum(1, keepdims=True) / count for v in (a, b))
    spread = np.sqrt((times * a * a).sum(1) * (times * b * b).sum(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        # rounding leaves equal numbers a spread near 0, not 0
        return np.where(spread > 1e-12 * count[:, 0], (times * a * b).sum(1) / spread, np.nan)


def _ranks(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """[draws, n] the mean rank of each row among rows that count `times` times."""
    _, places = np.unique(values, return_inverse=True)
    order = np.argsort(places, kind="stable")
    starts = np.flatnonzero(np.diff(places[order], prepend=-1))
    mass = np.add.reduceat(times[:, order], starts, axis=1)
    return (np.cumsum(mass, axis=1) - mass / 2)[:, places]
