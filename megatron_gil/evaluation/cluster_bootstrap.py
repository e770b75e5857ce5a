"""Intervals of numbers over rows that come in clusters, such as several pairs of one prompt: whole clusters are
resampled, since the rows of one are alike (Davison and Hinkley 1997, section 3.8)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np

from megatron_gil.evaluation.statistics import BLOCK, LEVEL, Estimate, interval

DRAWS = 2000


def number_clusters(keys: Sequence[Hashable]) -> np.ndarray:
    """[n] the number of each row's cluster, from 0 in the order in which they first appear; rows of one key are of one
    cluster."""
    number_of: dict[Hashable, int] = {}
    return np.array([number_of.setdefault(key, len(number_of)) for key in keys], dtype=np.int64)


def resampled_sums(
    clusters: np.ndarray, columns: Mapping[str, np.ndarray], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, np.ndarray]:
    """{name: [draws, ...]} sums over rows of each column, for as many clusters as there are, drawn with replacement.

    clusters: [n] from `number_clusters`. columns: [n, ...] by name.
    """
    num_clusters = int(clusters.max()) + 1
    flat = {name: column.reshape(len(clusters), -1).astype(np.float64) for name, column in columns.items()}
    sums = np.zeros((num_clusters, sum(column.shape[1] for column in flat.values())))
    np.add.at(sums, clusters, np.concatenate(list(flat.values()), axis=1))
    parts = [times @ sums for times in resampled_times(num_clusters, num_clusters, draws=draws, seed=seed)]
    ends = np.cumsum([column.shape[1] for column in flat.values()])[:-1]
    split = np.split(np.concatenate(parts), ends, axis=1)
    return {
        name: found.reshape(draws, *column.shape[1:])
        for (name, column), found in zip(columns.items(), split, strict=True)
    }


def resampled_times(num_clusters: int, num_rows: int, *, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each cluster occurs in each draw, [draws, clusters] in blocks; with `num_rows` numbers
    for each draw a block is of about BLOCK."""
    rng, block = np.random.default_rng(seed), max(1, BLOCK // num_rows)
    for start in range(0, draws, block):
        count = min(block, draws - start)
        drawn = rng.integers(num_clusters, size=(count, num_clusters)) + num_clusters * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * num_clusters).reshape(count, num_clusters)


def expanded_interval(value: float, resampled: np.ndarray, num_clusters: int) -> Estimate:
    """A statistic with the expanded percentile interval of its [draws] (Hesterberg 2015, American Statistician 69,
    371): as much wider than the plain one as Student's t asks for with so few clusters.

    With one cluster, whose spread is unknown, both ends are NaN.
    """
    if num_clusters < 2:
        return Estimate(value=value, low=math.nan, high=math.nan)
    from scipy.special import ndtr, stdtrit

    tail = float(ndtr(math.sqrt(num_clusters / (num_clusters - 1)) * stdtrit(num_clusters - 1, (1 - LEVEL) / 2)))
    return interval(value, resampled, level=1 - 2 * tail)
