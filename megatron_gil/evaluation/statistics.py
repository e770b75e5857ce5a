"""Numbers with their uncertainty, and the shape of a score distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 2_000_000
"""Numbers resampled at a time: 16 MB."""
LEVEL = 0.95
"""Of every interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Sequence[float], *, draws: int = 5000, seed: int = 0) -> Estimate:
    """Percentile bootstrap (Efron 1979) of the mean of independent values.

    A single value has no spread to resample: its interval has width 0, which does not mean that it is certain. Of no
    values all three are NaN.
    """
    sample = np.asarray(values, dtype=np.float64)
    assert sample.ndim == 1, sample.shape
    if not sample.size:
        return Estimate(value=math.nan, low=math.nan, high=math.nan)
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // sample.size)
    resampled = [
        sample[rng.integers(sample.size, size=(min(block, draws - start), sample.size))].mean(-1)
        for start in range(0, draws, block)
    ]
    return interval(float(sample.mean()), np.concatenate(resampled))


def interval(value: float, resampled: np.ndarray, *, level: float = LEVEL) -> Estimate:
    """The percentile interval of a statistic whose value in each bootstrap draw is given; draws that have none, NaN,
    are left out. All NaN where there is no value at all."""
    found = resampled[np.isfinite(resampled)]
    if not (math.isfinite(value) and found.size):
        return Estimate(value=math.nan, low=math.nan, high=math.nan)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value=float(value), low=float(low), high=float(high))


def t_interval(values: Sequence[float]) -> Estimate:
    """The mean of a few independent values, such as one a seed, with Student's interval, mean +- t s / sqrt(n).

    Of five normal values a percentile bootstrap interval holds the true mean in 83 % of the cases and not in 95 %; this
    one is exact there. A single value has no known spread, so its interval is without end.
    """
    from scipy.special import stdtrit

    sample = np.asarray(values, dtype=np.float64)
    if not sample.size:
        return Estimate(value=math.nan, low=math.nan, high=math.nan)
    mean = float(sample.mean())
    if sample.size == 1:
        return Estimate(value=mean, low=-math.inf, high=math.inf)
    half = float(stdtrit(sample.size - 1, (1 + LEVEL) / 2) * sample.std(ddof=1) / math.sqrt(sample.size))
    return Estimate(value=mean, low=mean - half, high=mean + half)


def wilson(share: float, num_trials: int) -> Estimate:
    """A share of independent trials with Wilson's interval (1927), which has a width even where all are alike."""
    from scipy.special import ndtri

    z2 = float(ndtri((1 + LEVEL) / 2)) ** 2
    middle = (share + z2 / (2 * num_trials)) / (1 + z2 / num_trials)
    half = math.sqrt(z2 * (share * (1 - share) / num_trials + z2 / (4 * num_trials**2))) / (1 + z2 / num_trials)
    return Estimate(value=share, low=max(0.0, middle - half), high=min(1.0, middle + half))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of so uneven a split if either side were as likely (Dixon and Mood 1946).

    Ties are left out beforehand. 1 where nothing was decided.
    """
    trials, term, tail = wins + losses, 1, 0
    for k in range(min(wins, losses) + 1):  # term: the binomial coefficient of k
        tail += term
        term = term * (trials - k) // (k + 1)
    return min(1.0, _ratio(2 * tail, trials))


def _ratio(count: int, bits: int) -> float:
    """count / 2^bits, where neither may fit a float."""
    shift = max(0, count.bit_length() - 64)
    return math.ldexp(count >> shift, shift - bits)


def skewness(values: Sequence[float]) -> float:
    """mean((x - mean)^3) / std^3 (population moments): 0 for a symmetric distribution, negative for a long left tail;
    0 where all values are equal."""
    centred = np.asarray(values, dtype=np.float64) - np.mean(values)
    spread = np.sqrt(np.mean(centred**2))
    return float(np.mean(centred**3) / spread**3) if spread > 0 else 0.0
