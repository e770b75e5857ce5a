"""Numbers with their uncertainty: bootstrap intervals, and the shape of a score distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BLOCK = 2_000_000  # numbers resampled at a time: 16 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    values: Sequence[float],
    *,
    level: float = 0.95,
    draws: int = 5000,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap (Efron 1979) of the mean of independent values.

    A single value has no spread to resample: its interval has width 0, which does not mean that it is certain.
    """
    sample = np.asarray(values, dtype=np.float64)
    assert sample.ndim == 1, sample.shape
    assert sample.size, "no values"
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // sample.size)
    resampled = [
        sample[rng.integers(sample.size, size=(min(block, draws - start), sample.size))].mean(-1)
        for start in range(0, draws, block)
    ]
    low, high = np.quantile(np.concatenate(resampled), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value=float(sample.mean()), low=float(low), high=float(high))


def skewness(values: Sequence[float]) -> float:
    """mean((x - mean)^3) / std^3 (population moments): 0 for a symmetric distribution, negative for a long left tail;
    0 where all values are equal."""
    centred = np.asarray(values, dtype=np.float64) - np.mean(values)
    spread = np.sqrt(np.mean(centred**2))
    return float(np.mean(centred**3) / spread**3) if spread > 0 else 0.0
