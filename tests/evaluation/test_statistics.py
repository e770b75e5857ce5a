"""Intervals against theory, shapes against distributions whose moments are known."""

import math

import numpy as np
import pytest
import scipy.stats

from megatron_gil.evaluation.statistics import bootstrap, skewness, t_interval


def test_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    """n = 400: half width 1.96 sd / sqrt(n), to the 4 % that 5,000 draws allow."""
    values = np.random.default_rng(1).normal(3, 2, 400).tolist()
    estimate = bootstrap(values)
    half = 1.96 * float(np.std(values)) / math.sqrt(400)
    assert estimate.value == pytest.approx(float(np.mean(values)))
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.06)
    assert estimate.value - estimate.low == pytest.approx(half, rel=0.06)


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    estimates = [bootstrap(rng.normal(0, 1, 40).tolist(), draws=400, seed=i) for i in range(300)]
    covered = sum(e.low <= 0 <= e.high for e in estimates) / 300
    assert 0.90 <= covered <= 0.98  # 95 % +- 4 standard errors, less the bootstrap's known shortfall at n = 40


def test_a_t_interval_is_that_of_scipy_and_covers_where_the_bootstrap_does_not() -> None:
    draws = np.random.default_rng(4).normal(0, 1, (2000, 5))
    found = [t_interval(row.tolist()) for row in draws]
    mean, error = draws[0].mean(), scipy.stats.sem(draws[0])
    assert (found[0].low, found[0].high) == pytest.approx(scipy.stats.t.interval(0.95, 4, mean, error))
    assert 0.93 <= sum(e.low <= 0 <= e.high for e in found) / 2000 <= 0.97  # +- 4 standard errors
    narrow = [bootstrap(row.tolist(), draws=400, seed=i) for i, row in enumerate(draws[:500])]
    assert sum(e.low <= 0 <= e.high for e in narrow) / 500 < 0.9
    assert t_interval([2.0]).value == 2.0
    assert t_interval([2.0]).high == math.inf
    assert math.isnan(t_interval([]).value)


def test_a_seed_gives_the_same_interval_however_it_is_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.random.default_rng(3).normal(size=30))
    whole = bootstrap(values, draws=1000)
    monkeypatch.setattr("megatron_gil.evaluation.statistics.BLOCK", 30 * 7)
    assert bootstrap(values, draws=1000) == whole


def test_skewness() -> None:
    assert skewness([-1.0, 0.0, 1.0]) == 0
    assert skewness([2.0, 2.0]) == 0
    two_points = [0.0] * 3 + [1.0]  # Bernoulli(p): (1 - 2p) / sqrt(p (1 - p))
    assert skewness(two_points) == pytest.approx((1 - 0.5) / math.sqrt(0.25 * 0.75))
    exponential = np.random.default_rng(6).exponential(size=200_000)
    assert skewness(exponential.tolist()) == pytest.approx(2, abs=0.1)
    assert skewness((-exponential).tolist()) == pytest.approx(-skewness(exponential.tolist()))
