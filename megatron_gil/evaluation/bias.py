"""What a judge is swayed by besides the text: the place in which a response is shown, and its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from megatron_gil.evaluation.comparisons import Judgment
from megatron_gil.evaluation.statistics import BLOCK, Estimate, bootstrap, interval, sign_test
from megatron_gil.evaluation.winrate import MARGIN, by_prompt

DRAWS = 1000
MAX_BINS = 5
PRIOR_VARIANCE = 100.0
"""Of both coefficients of the logistic fit: without it a policy that wins everything has none. At a win rate of 90 %
over 100 prompts it moves the result by 0.0002."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionBias:
    """Of a judge that shows or was shown one response first."""

    first: Estimate
    """Share of the verdicts that are no tie in which the response in the first place won; 0.5 without a bias. A
    judgment in both orders counts once."""
    sign_test: float
    """Exact two-sided p-value of so uneven a number of judgments that favour the first and the second place."""
    both_orders: int
    """Comparisons that were judged in both orders."""
    consistent: Estimate
    """Share of those whose two verdicts are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBin:
    """Comparisons whose difference in length, ours - theirs, lies in one range."""

    shortest: int
    longest: int
    """The smallest and largest difference, characters."""
    median: float
    num_prompts: int
    win_rate: Estimate
    """Wins and half of the ties."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBias:
    difference: float
    """Mean length of ours - theirs, characters."""
    win_rate: Estimate
    """Wins and half of the ties."""
    controlled: Estimate
    """The same at equal length: sigmoid(a) of the fit P(win) = sigmoid(a + b tanh(difference / its standard
    deviation)), in the manner of Dubois et al. 2024 (arXiv 2404.04475)."""
    slope: Estimate
    """b of that fit: above 0 where longer responses win more often."""
    bins: tuple[LengthBin, ...]
    """In order of the difference, with as many prompts each as ties allow."""


def position_bias(judgments: Sequence[Judgment]) -> PositionBias | None:
    """None where no judgment says which response was shown first."""
    shown = [j for found in by_prompt(judgments).values() for j in found if j.ours_first or j.theirs_first]
    if not shown:
        return None
    places = [found for j in shown if (found := _winning_places(j))]
    both = [j for j in shown if j.ours_first and j.theirs_first]
    return PositionBias(
        first=bootstrap([fmean(found) for found in places]),
        sign_test=sign_test(sum(fmean(found) > 0.5 for found in places), sum(fmean(found) < 0.5 for found in places)),
        both_orders=len(both),
        consistent=bootstrap([float(j.ours_first == j.theirs_first) for j in both]),
    )


def _winning_places(judgment: Judgment) -> list[float]:
    """Of the verdicts in either order that are no tie: 1 where the first place won, 0 where the second did."""
    firsts = ((judgment.ours_first, "win"), (judgment.theirs_first, "lose"))
    return [float(verdict == of_first) for verdict, of_first in firsts if verdict in ("win", "lose")]


def length_bias(judgments: Sequence[Judgment]) -> LengthBias | None:
    """None where nothing was judged. Resampled by prompt, so that repeats of one prompt stay together."""
    prompts = list(by_prompt(judgments).values())
    if not prompts:
        return None
    differences = np.array([len(j.ours) - len(j.theirs) for found in prompts for j in found])
    won = np.array([(MARGIN[j.outcome] + 1) / 2 for found in prompts for j in found])
    weights = np.array([1 / len(found) for found in prompts for _ in found])
    prompt_idx = np.array([i for i, found in enumerate(prompts) for _ in found])
    spread = differences.std()
    x = np.tanh(differences / spread) if spread > 0 else np.zeros(len(differences))
    a, b = fit_logistic(x, won, weights[None])
    rng = np.random.default_rng(0)
    block = max(1, BLOCK // len(won))
    drawn = [
        fit_logistic(x, won, _counts(rng, len(prompts), min(block, DRAWS - start))[:, prompt_idx] * weights)
        for start in range(0, DRAWS, block)
    ]
    intercepts, slopes = (np.concatenate(part) for part in zip(*drawn, strict=True))
    return LengthBias(
        difference=float(np.average(differences, weights=weights)),
        win_rate=bootstrap([fmean((MARGIN[j.outcome] + 1) / 2 for j in found) for found in prompts]),
        controlled=interval(float(_sigmoid(a)[0]), _sigmoid(intercepts)),
        slope=interval(float(b[0]), slopes),
        bins=_bins(differences, won, prompt_idx),
    )


def fit_logistic(x: np.ndarray, won: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a and b of P = sigmoid(a + b x) that maximise the weighted likelihood, with a normal prior of PRIOR_VARIANCE on
    both. x, won (in [0, 1]): [N]; weights: [draws, N]; gives two [draws].

    Newton's method. The objective is strictly concave, and a step is halved until it does not lower it.
    """
    a, b = np.zeros(len(weights)), np.zeros(len(weights))
    best = _log_posterior(a, b, x, won, weights)
    for _ in range(50):
        p = _sigmoid(a[:, None] + b[:, None] * x)
        residual, curvature = weights * (won - p), weights * p * (1 - p)
        gradient = np.stack([residual.sum(1) - a / PRIOR_VARIANCE, residual @ x - b / PRIOR_VARIANCE])
        aa, ab, bb = (curvature @ power for power in (np.ones_like(x), x, x * x))
        aa, bb = aa + 1 / PRIOR_VARIANCE, bb + 1 / PRIOR_VARIANCE
        determinant = aa * bb - ab * ab
        step_a = (bb * gradient[0] - ab * gradient[1]) / determinant
        step_b = (aa * gradient[1] - ab * gradient[0]) / determinant
        size = np.ones(len(weights))
        reached = _log_posterior(a + step_a, b + step_b, x, won, weights)
        while (worse := reached < best - 1e-12 * np.abs(best)).any():
            size[worse] /= 2
            reached = _log_posterior(a + size * step_a, b + size * step_b, x, won, weights)
        a, b, best = a + size * step_a, b + size * step_b, reached
        if np.abs(np.stack([step_a, step_b])).max() < 1e-9:
            break
    return a, b


def _log_posterior(a: np.ndarray, b: np.ndarray, x: np.ndarray, won: np.ndarray, weights: np.ndarray) -> np.ndarray:
    z = a[:, None] + b[:, None] * x
    return (weights * (won * z - np.logaddexp(0, z))).sum(1) - (a * a + b * b) / (2 * PRIOR_VARIANCE)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(z / 2))


def _counts(rng: np.random.Generator, size: int, draws: int) -> np.ndarray:
    """How often each of `size` things is drawn in each bootstrap draw, [draws, size]."""
    return rng.multinomial(size, np.full(size, 1 / size), size=draws)


def _bins(differences: np.ndarray, won: np.ndarray, prompt_idx: np.ndarray) -> tuple[LengthBin, ...]:
    edges = np.unique(np.quantile(differences, np.linspace(0, 1, MAX_BINS + 1)[1:-1]))
    places = np.searchsorted(edges, differences, side="right")
    bins = []
    for place in np.unique(places):
        here = places == place
        counts = np.bincount(prompt_idx[here])
        values = np.bincount(prompt_idx[here], weights=won[here])[counts > 0] / counts[counts > 0]
        bins.append(
            LengthBin(
                shortest=int(differences[here].min()),
                longest=int(differences[here].max()),
                median=float(np.median(differences[here])),
                num_prompts=len(values),
                win_rate=bootstrap(values.tolist()),
            )
        )
    return tuple(bins)
