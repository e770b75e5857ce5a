"""How far judges and raters agree beyond chance, on the comparisons that several of them judged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from megatron_gil.evaluation.comparisons import Comparison, Judgment
from megatron_gil.evaluation.judge import Verdict
from megatron_gil.evaluation.statistics import Estimate, interval
from megatron_gil.evaluation.winrate import MARGIN

CATEGORIES: tuple[Verdict, ...] = ("win", "tie", "lose")
DRAWS = 5000

Verdicts = Mapping[Comparison, Verdict]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAgreement:
    """Of two judges, or two raters of one judge."""

    first: str
    second: str
    num_items: int
    """Comparisons that both judged."""
    agreed: Estimate
    """Share of them with the same verdict."""
    kappa: Estimate
    """Cohen's (1960); NaN where chance alone would agree always."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaterAgreement:
    """Of all raters of one judge."""

    judge: str
    num_raters: int
    num_items: int
    """Comparisons with two raters or more."""
    kappa: Estimate
    """Fleiss' (1971), an item with as many raters as it has; NaN where chance alone would agree always."""


def agreements(judgments: Sequence[Judgment]) -> tuple[list[PairAgreement], list[RaterAgreement]]:
    """Of every two judges, and within a judge of several raters of every two raters and of all. Pairs that have no
    comparison in common are left out, and identical responses, which nobody judged."""
    by_judge: dict[str, dict[str, dict[Comparison, Verdict]]] = {}
    for j in judgments:
        if j.outcome in MARGIN and not j.comparison.is_identical:
            found = by_judge.setdefault(j.judge, {}).setdefault(j.rater, {})
            found[j.comparison] = j.outcome  # type: ignore[assignment]
    pairs = [
        pair
        for judge, raters in by_judge.items()
        if len(raters) > 1
        for pair in _pairs({f"{judge}: {rater}": verdicts for rater, verdicts in raters.items()})
    ]
    pairs += _pairs({judge: majority(raters.values()) for judge, raters in by_judge.items()})
    return pairs, [a for judge, raters in by_judge.items() if (a := _of_raters(judge, raters)) is not None]


def majority(raters: Iterable[Verdicts]) -> dict[Comparison, Verdict]:
    """What more raters said than anything else; a tie where no verdict has most."""
    votes: dict[Comparison, Counter[Verdict]] = {}
    for verdicts in raters:
        for item, verdict in verdicts.items():
            votes.setdefault(item, Counter())[verdict] += 1
    return {item: _most_common(counted) for item, counted in votes.items()}


def _most_common(votes: Counter[Verdict]) -> Verdict:
    (top, most), *rest = votes.most_common()
    return "tie" if rest and rest[0][1] == most else top


def cohen_kappa(table: np.ndarray) -> np.ndarray:
    """table: [..., C, C] counts of (first's category, second's); gives [...]."""
    share = table / table.sum((-2, -1), keepdims=True)
    observed = np.trace(share, axis1=-2, axis2=-1)
    chance = (share.sum(-1) * share.sum(-2)).sum(-1)
    return _beyond_chance(observed, chance)


def fleiss_kappa(patterns: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """patterns: [P, C] raters that chose each category, two or more in all; counts: [..., P] items of each pattern.
    Gives [...]."""
    raters = patterns.sum(-1)
    pairs_agree = (patterns * (patterns - 1)).sum(-1) / (raters * (raters - 1))
    observed = (counts * pairs_agree).sum(-1) / counts.sum(-1)
    votes = counts @ patterns
    chance = ((votes / votes.sum(-1, keepdims=True)) ** 2).sum(-1)
    return _beyond_chance(observed, chance)


def _beyond_chance(observed: np.ndarray, chance: np.ndarray) -> np.ndarray:
    possible = 1 - chance
    return np.where(possible > 1e-12, (observed - chance) / np.where(possible > 1e-12, possible, 1), math.nan)


def _pairs(judges: Mapping[str, Verdicts]) -> list[PairAgreement]:
    found = []
    for (first, ours), (second, theirs) in combinations(judges.items(), 2):
        items = [item for item in ours if item in theirs]
        if items:
            table = np.zeros((3, 3))
            for item in items:
                table[CATEGORIES.index(ours[item]), CATEGORIES.index(theirs[item])] += 1
            drawn = _resampled(table.ravel()).reshape(-1, 3, 3)
            agreed = np.trace(drawn, axis1=-2, axis2=-1) / len(items)
            found.append(
                PairAgreement(
                    first=first,
                    second=second,
                    num_items=len(items),
                    agreed=interval(np.trace(table) / len(items), agreed),
                    kappa=interval(float(cohen_kappa(table)), cohen_kappa(drawn)),
                )
            )
    return found


def _of_raters(judge: str, raters: Mapping[str, Verdicts]) -> RaterAgreement | None:
    votes: dict[Comparison, list[int]] = {}
    for verdicts in raters.values():
        for item, verdict in verdicts.items():
            votes.setdefault(item, [0, 0, 0])[CATEGORIES.index(verdict)] += 1
    shared = [tuple(counted) for counted in votes.values() if sum(counted) > 1]
    if not shared:
        return None
    patterns = Counter(shared)
    chosen, counts = np.array(list(patterns), dtype=float), np.array(list(patterns.values()), dtype=float)
    return RaterAgreement(
        judge=judge,
        num_raters=len(raters),
        num_items=len(shared),
        kappa=interval(float(fleiss_kappa(chosen, counts)), fleiss_kappa(chosen, _resampled(counts))),
    )


def _resampled(counts: np.ndarray) -> np.ndarray:
    """Bootstrap draws of items that fall into so many of each kind, [DRAWS, kinds]; the same ones each time."""
    size = int(counts.sum())
    return np.random.default_rng(0).multinomial(size, counts / size, size=DRAWS).astype(float)
