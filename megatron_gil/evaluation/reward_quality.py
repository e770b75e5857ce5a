"""How good a reward model is on preference pairs: accuracy, margins, calibration and the part that length has in them,
over all pairs and in slices of them. Pure: scored pairs in, numbers out.

Intervals are of 95 %, by resampling prompts (cluster_bootstrap.py). An end of an interval that is not known is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.calibration import (
    Bin,
    best_temperature,
    bin_ids,
    calibration_error,
    correct,
    error_if_calibrated,
    log_losses,
    reliability,
    residuals,
    sigmoid,
)
from megatron_gil.evaluation.cluster_bootstrap import DRAWS, expanded_interval, number_clusters, resampled_sums
from megatron_gil.evaluation.scored_pairs import ScoredPair
from megatron_gil.evaluation.statistics import Estimate, wilson

NUM_LENGTH_BUCKETS = 4
UNLABELLED = "(no group)"

Sums = Mapping[str, np.ndarray]
"""Sums of columns over pairs: of the pairs themselves, or [draws] of resampled ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    """What all margins are to be divided by to lose least, and what that gives on the same pairs."""

    value: Estimate
    """0: every pair is ranked right or tied. Infinity: the mean margin is not above 0. NaN: all margins are 0."""
    log_loss: float | None
    """None where the temperature is none of use."""
    calibration_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthEffect:
    """Of lengths in characters; shares are of the pairs whose responses differ in length."""

    longer_scores_higher: Estimate
    """Share where the longer response has the higher score; a tie counts half."""
    longer_is_chosen: Estimate
    """What it would be if the model chose as the data does."""
    correlation: Estimate
    """Spearman's, of the differences in score and in length, each pair taken in both directions: it does not depend on
    which response comes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Of one set of pairs."""

    num_pairs: int
    num_prompts: int
    """Different ones; pairs of one prompt are resampled together."""
    num_ties: int
    accuracy: Estimate
    """Share of pairs whose chosen response scores higher; a tie counts half. Where all prompts agree, so that
    resampling shows no spread, the interval is Wilson's."""
    margin: Estimate
    """Mean of score_chosen - score_rejected."""
    margin_median: float
    log_loss: Estimate
    """Mean of -log sigmoid(margin), nats; log 2 says nothing."""
    calibration_error: Estimate
    """The interval is the basic one, 2 x value - quantiles: resampling adds the noise that this error already has."""
    calibrated_mean: float
    """The calibration error that a perfectly calibrated model would show here, on average ..."""
    calibrated_high: float
    """... and in one case of twenty or less."""
    bins: tuple[Bin, ...]
    temperature: Temperature
    length: LengthEffect


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardQuality:
    sources: tuple[str, ...]
    num_identical: int
    """Rows whose two responses are one text; they are no pairs and count nowhere else."""
    overall: Quality
    slices: Mapping[str, Mapping[str, Quality]]
    """How the pairs are divided (file, group, ...) -> name of a part -> its quality."""


def reward_quality(pairs: Sequence[ScoredPair], *, draws: int = DRAWS, seed: int = 0) -> RewardQuality:
    """ConfigError where there is not one pair of two different responses."""
    kept = [pair for pair in pairs if not pair.is_identical]
    sources = tuple(dict.fromkeys(pair.source for pair in pairs))
    if not kept:
        raise ConfigError(f"{', '.join(sources)}: no pair of two different responses, so there is nothing to evaluate")
    return RewardQuality(
        sources=sources,
        num_identical=len(pairs) - len(kept),
        overall=quality(kept, draws=draws, seed=seed),
        slices={
            by: {name: quality(part, draws=draws, seed=seed) for name, part in parts.items()}
            for by, parts in divisions(kept).items()
        },
    )


def divisions(pairs: Sequence[ScoredPair]) -> dict[str, dict[str, list[ScoredPair]]]:
    """By file where there are several, by known group where any has one, by the length of the chosen response against
    the rejected one, and by the length of prompt and longer response, in quarters."""
    found: dict[str, dict[str, list[ScoredPair]]] = {}
    if len({pair.source for pair in pairs}) > 1:
        found["file"] = divide(pairs, [pair.source for pair in pairs])
    if any(pair.group is not None for pair in pairs):
        labels = [UNLABELLED if pair.group is None else pair.group for pair in pairs]
        found["group"] = dict(sorted(divide(pairs, labels).items(), key=lambda item: item[0] == UNLABELLED))
    shorter_first = divide(pairs, [compare_lengths(len(pair.chosen), len(pair.rejected)) for pair in pairs])
    found["chosen length"] = {name: shorter_first[name] for name in LENGTH_RATIOS if name in shorter_first}
    lengths = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    found["characters"] = divide_by_size(pairs, lengths, NUM_LENGTH_BUCKETS)
    return found


def divide(pairs: Sequence[ScoredPair], names: Sequence[str]) -> dict[str, list[ScoredPair]]:
    """The pairs of each name, in the order in which the names first appear."""
    parts: dict[str, list[ScoredPair]] = {}
    for pair, name in zip(pairs, names, strict=True):
        parts.setdefault(name, []).append(pair)
    return parts


def divide_by_size(pairs: Sequence[ScoredPair], sizes: Sequence[int], count: int) -> dict[str, list[ScoredPair]]:
    """Parts of equal mass by rising size; equal sizes stay together, so that there may be fewer than `count`."""
    edges = np.unique(np.quantile(sizes, np.arange(1, count) / count, method="lower"))
    edges = edges[edges < max(sizes)]
    starts = [0, *(int(edge) + 1 for edge in edges)]
    names = [f"{start:,} to {int(edge):,}" for start, edge in zip(starts, edges, strict=False)]
    names.append(f"{starts[-1]:,} and more")
    places = np.searchsorted(edges, sizes, side="left")
    parts = divide(pairs, [names[place] for place in places])
    return {name: parts[name] for name in names if name in parts}


LENGTH_RATIOS = ("under half", "shorter", "within 10 %", "longer", "over double")
"""Of the chosen response's length against the rejected one's."""


def compare_lengths(chosen: int, rejected: int) -> str:
    """One of LENGTH_RATIOS."""
    if 10 * abs(chosen - rejected) <= max(chosen, rejected):
        return LENGTH_RATIOS[2]
    if chosen < rejected:
        return LENGTH_RATIOS[0 if 2 * chosen < rejected else 1]
    return LENGTH_RATIOS[4 if chosen > 2 * rejected else 3]


def quality(pairs: Sequence[ScoredPair], *, draws: int = DRAWS, seed: int = 0) -> Quality:
    """Of at least one pair of two different responses."""
    assert pairs
    margins = np.array([pair.margin for pair in pairs])
    longer_by = np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs], dtype=np.float64)
    clusters = number_clusters([pair.prompt for pair in pairs])
    num_prompts, bins = int(clusters.max()) + 1, bin_ids(margins)
    temperature = best_temperature(margins)
    columns = _columns(margins, longer_by, bins, temperature)
    values = _statistics({name: column.sum(0) for name, column in columns.items()}, temperature)
    resampled = _statistics(resampled_sums(clusters, columns, draws=draws, seed=seed), temperature)

    def estimate(name: str) -> Estimate:
        return expanded_interval(float(values[name]), resampled[name], num_prompts)

    mean, high = error_if_calibrated(margins, bins, seed=seed)
    return Quality(
        num_pairs=len(pairs),
        num_prompts=num_prompts,
        num_ties=int((margins == 0).sum()),
        accuracy=_accuracy(estimate("accuracy"), num_prompts),
        margin=estimate("margin"),
        margin_median=float(np.median(margins)),
        log_loss=estimate("log_loss"),
        calibration_error=_basic(estimate("calibration_error")),
        calibrated_mean=mean,
        calibrated_high=high,
        bins=reliability(margins, bins),
        temperature=_temperature(temperature, estimate("inverse_temperature"), margins, bins),
        length=LengthEffect(
            longer_scores_higher=estimate("longer_scores_higher"),
            longer_is_chosen=estimate("longer_is_chosen"),
            correlation=estimate("correlation"),
        ),
    )


def _columns(margins: np.ndarray, longer_by: np.ndarray, bins: np.ndarray, temperature: float) -> dict[str, np.ndarray]:
    """What the statistics are functions of, once summed over pairs: [n], or [n, bins]."""
    unequal = np.sign(np.abs(longer_by))
    rank_of_margin, rank_of_length = signed_ranks(margins), signed_ranks(longer_by)
    factor = 1 / temperature if 0 < temperature < math.inf else 0.0
    wrong = sigmoid(-factor * margins)  # the model's probability that the rejected response is the better one
    return {
        "pairs": np.ones_like(margins),
        "correct": correct(margins),
        "margins": margins,
        "log_losses": log_losses(margins),
        "residuals": residuals(margins, bins),
        "slopes": margins * wrong,
        "curvatures": margins**2 * wrong * (1 - wrong),
        "unequal": unequal,
        "longer_scores_higher": unequal * correct(margins * np.sign(longer_by)),
        "longer_is_chosen": unequal * (longer_by > 0),
        "rank_products": rank_of_margin * rank_of_length,
        "margin_ranks": rank_of_margin**2,
        "length_ranks": rank_of_length**2,
    }


def _statistics(sums: Sums, temperature: float) -> dict[str, np.ndarray]:
    """NaN where a sum that divides is 0.

    inverse_temperature: one step of Newton's method from 1 / temperature, to which it is equal for the pairs
    themselves; of resampled pairs it is their own optimum to first order.
    """
    factor = 1 / temperature if 0 < temperature < math.inf else math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "accuracy": sums["correct"] / sums["pairs"],
            "margin": sums["margins"] / sums["pairs"],
            "log_loss": sums["log_losses"] / sums["pairs"],
            "calibration_error": calibration_error(sums["residuals"], sums["pairs"]),
            "inverse_temperature": factor + sums["slopes"] / sums["curvatures"],
            "longer_scores_higher": sums["longer_scores_higher"] / sums["unequal"],
            "longer_is_chosen": sums["longer_is_chosen"] / sums["unequal"],
            "correlation": sums["rank_products"] / np.sqrt(sums["margin_ranks"] * sums["length_ranks"]),
        }


def signed_ranks(values: np.ndarray) -> np.ndarray:
    """[n] of each value among all values and their negatives, less the middle rank: 0 for 0, of opposite sign for a
    negated value; equal values share the mean of their ranks."""
    both = np.concatenate([values, -values])
    _, places, counts = np.unique(both, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - counts + 1 + last) / 2
    return ranks[places[: len(values)]] - (len(both) + 1) / 2


def _accuracy(found: Estimate, num_prompts: int) -> Estimate:
    if found.low < found.high:
        return found
    return wilson(found.value, num_prompts)


def _basic(found: Estimate) -> Estimate:
    """From the percentile interval, for a number that is never negative."""
    low, high = (2 * found.value - end for end in (found.high, found.low))
    return Estimate(value=found.value, low=max(0.0, low), high=max(0.0, high)) if low <= high else found


def _temperature(value: float, inverse: Estimate, margins: np.ndarray, bins: np.ndarray) -> Temperature:
    if not 0 < value < math.inf:
        unknown = Estimate(value=value, low=math.nan, high=math.nan)
        return Temperature(value=unknown, log_loss=None, calibration_error=None)
    low, high = (math.inf if end <= 0 else 1 / end for end in (inverse.high, inverse.low))
    cooled = margins / value
    return Temperature(
        value=Estimate(value=value, low=low, high=high),
        log_loss=float(log_losses(cooled).mean()),
        calibration_error=float(calibration_error(residuals(cooled, bins).sum(0), len(margins))),
    )
