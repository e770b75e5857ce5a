"""Whether a reward model's margins are as sure as they should be.

A margin m = score_chosen - score_rejected says that the chosen response is the better one with probability p =
sigmoid(m) (Bradley and Terry 1952). With the two responses swapped it would be 1 - p, which says nothing new; so a pair
is one prediction: the response that scores higher is the better one, with confidence max(p, 1 - p), which is right
where that response is the chosen one, wrong where it is not, and half right where the scores are equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_gil.evaluation.statistics import BLOCK, Estimate, wilson

MAX_BINS = 10
MIN_BIN_PAIRS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Pairs of about the same confidence."""

    low: float
    """The smallest confidence in it."""
    high: float
    num_pairs: int
    confidence: float
    """Mean."""
    accuracy: Estimate
    """Wilson's interval, which takes pairs as independent."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) for any finite x."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def correct(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen response scores higher, 0 where it scores lower, 1/2 for a tie."""
    return (np.sign(margins) + 1) / 2


def confidence(margins: np.ndarray) -> np.ndarray:
    """max(p, 1 - p), in [1/2, 1]."""
    return sigmoid(np.abs(margins))


def log_losses(margins: np.ndarray) -> np.ndarray:
    """-log p of each pair, nats; log 2 for a tie."""
    return np.logaddexp(0.0, -margins)


def bin_ids(margins: np.ndarray) -> np.ndarray:
    """[n] a number from 0 for each pair: bins of equal mass by confidence. Equal margins share a bin.

    There are MAX_BINS bins, or as many as get MIN_BIN_PAIRS pairs each, at least one. (Dividing all margins by a
    temperature keeps every pair in its bin.)
    """
    size = np.abs(margins)
    count = max(1, min(MAX_BINS, len(margins) // MIN_BIN_PAIRS))
    edges = np.quantile(size, np.arange(1, count) / count, method="higher")
    return np.unique(np.searchsorted(edges, size, side="right"), return_inverse=True)[1]


def residuals(margins: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """[n, bins] correct - confidence of each pair in the column of its bin, 0 in the others."""
    found = np.zeros((len(margins), int(bins.max()) + 1))
    found[np.arange(len(margins)), bins] = correct(margins) - confidence(margins)
    return found


def calibration_error(residual_sums: np.ndarray, num_pairs: np.ndarray | int) -> np.ndarray:
    """Expected calibration error, sum_b n_b / n |accuracy_b - confidence_b| (Naeini et al. 2015; Guo et al. 2017,
    equation 3), from the sum of `residuals` [..., bins] over pairs."""
    return np.abs(residual_sums).sum(-1) / num_pairs


def reliability(margins: np.ndarray, bins: np.ndarray) -> tuple[Bin, ...]:
    """The bins of a reliability diagram, by rising confidence."""
    sure, right = confidence(margins), correct(margins)
    found = []
    for b in range(int(bins.max()) + 1):
        here = bins == b
        found.append(
            Bin(
                low=float(sure[here].min()),
                high=float(sure[here].max()),
                num_pairs=int(here.sum()),
                confidence=float(sure[here].mean()),
                accuracy=wilson(float(right[here].mean()), int(here.sum())),
            )
        )
    return tuple(found)


def error_if_calibrated(
    margins: np.ndarray, bins: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """(mean, 95th percentile) of the calibration error that a perfectly calibrated model shows on so many pairs of
    these confidences. It is above 0, since the accuracy of a bin is that of a sample (consistency resampling, Broecker
    and Smith 2007)."""
    rng, sure = np.random.default_rng(seed), confidence(margins)
    order = np.argsort(bins, kind="stable")
    sure, starts = sure[order], np.flatnonzero(np.diff(bins[order], prepend=-1))
    decided = margins[order] != 0  # a tie is half right, whatever is drawn
    block, found = max(1, BLOCK // len(sure)), []
    for start in range(0, draws, block):
        drawn = rng.random((min(block, draws - start), len(sure))) < sure
        off = np.where(decided, drawn - sure, 0.0)
        found.append(calibration_error(np.add.reduceat(off, starts, axis=1), len(sure)))
    errors = np.concatenate(found)
    return float(errors.mean()), float(np.quantile(errors, 0.95))


def best_temperature(margins: np.ndarray) -> float:
    """The T > 0 at which the mean of -log sigmoid(m / T) is smallest (Guo et al. 2017, section 4.2).

    0 where no margin is negative, since smaller is then always better; infinity where the mean margin is not positive:
    no T is better than a coin. NaN where all margins are 0 and T makes no difference.
    """
    largest = np.abs(margins).max()
    if largest == 0:
        return math.nan
    scaled = margins / largest
    if scaled.mean() <= 0:
        return math.inf
    if scaled.min() >= 0:
        return 0.0
    from scipy.optimize import brentq

    def slope(log_factor: float) -> float:
        """Of the loss in the factor 1 / T, whose sign changes once."""
        return -float(np.mean(scaled * sigmoid(-math.exp(log_factor) * scaled)))

    low, high = -1.0, 1.0
    while slope(low) > 0:
        low -= 2
    while slope(high) < 0:
        if high > 600:  # all but a few immeasurably small margins are positive
            return 0.0
        high += 2
    root: float = brentq(slope, low, high, xtol=1e-12)  # type: ignore[assignment]
    return float(largest / math.exp(root))
