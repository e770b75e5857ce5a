"""Kappas against published examples and counting, their intervals against resampling item by item."""

import math
import random

import numpy as np
import pytest

from megatron_gil.evaluation.agreement import CATEGORIES, agreements, cohen_kappa, fleiss_kappa, majority
from megatron_gil.evaluation.comparisons import Comparison
from megatron_gil.evaluation.judge import Verdict
from tests.evaluation.judged import judged


def kappa_by_counting(first: list[Verdict], second: list[Verdict]) -> float:
    """Cohen (1960), equation 1."""
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum(first.count(c) * second.count(c) for c in CATEGORIES) / n**2
    return (observed - chance) / (1 - chance)


def test_cohen_of_a_textbook() -> None:
    """Two readers of 50 grant proposals: 20 both yes, 15 both no, 5 and 10 apart; kappa is 0.4."""
    assert float(cohen_kappa(np.array([[20.0, 5.0], [10.0, 15.0]]))) == pytest.approx(0.4)


def test_fleiss_of_a_textbook() -> None:
    """Fourteen raters put ten subjects into five categories; kappa is 0.210."""
    subjects = """0 0 0 0 14  0 2 6 4 2  0 0 3 5 6  0 3 9 2 0  2 2 8 1 1
                  7 7 0 0 0   3 2 6 3 0  2 5 3 2 2  6 5 2 1 0  0 2 2 3 7"""
    patterns = np.array(subjects.split(), dtype=float).reshape(10, 5)
    assert float(fleiss_kappa(patterns, np.ones(10))) == pytest.approx(0.210, abs=5e-4)


def test_agreement_of_two_judges() -> None:
    rng = random.Random(0)
    first: list[Verdict] = [rng.choice(CATEGORIES) for _ in range(200)]
    second: list[Verdict] = [v if rng.random() < 0.6 else rng.choice(CATEGORIES) for v in first]
    rows = [judged(v, str(i), judge="one") for i, v in enumerate(first)]
    rows += [judged(v, str(i), judge="two") for i, v in enumerate(second)]
    rows += [judged("win", "alone", judge="one"), judged("refused", "0", ours="other", judge="two")]
    rows += [judged("tie", "same", ours="a", theirs=" a", judge=judge) for judge in ("one", "two")]
    (pair,), raters = agreements(rows)
    assert (pair.first, pair.second, pair.num_items, raters) == ("one", "two", 200, [])
    assert pair.agreed.value == sum(a == b for a, b in zip(first, second, strict=True)) / 200
    assert pair.kappa.value == pytest.approx(kappa_by_counting(first, second))

    drawn = []
    for _ in range(4000):
        items = [rng.randrange(200) for _ in range(200)]
        drawn.append(kappa_by_counting([first[i] for i in items], [second[i] for i in items]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert pair.kappa.low == pytest.approx(low, abs=0.015)
    assert pair.kappa.high == pytest.approx(high, abs=0.015)


def test_raters_of_one_judge() -> None:
    """Every two of them, all together, and their majority against the language model."""
    votes: dict[str, list[Verdict]] = {
        "anna": ["win", "win", "lose", "tie", "win", "lose"],
        "ben": ["win", "lose", "lose", "tie", "win", "lose"],
        "cleo": ["win", "win", "tie", "tie", "lose", "lose"],
    }
    rows = [judged(v, str(i), judge="people", rater=name) for name, found in votes.items() for i, v in enumerate(found)]
    model: list[Verdict] = ["win", "win", "lose", "tie", "win", "win"]
    rows += [judged(v, str(i), judge="model") for i, v in enumerate(model)]
    pairs, (raters,) = agreements(rows)
    assert [(p.first, p.second) for p in pairs] == [
        ("people: anna", "people: ben"),
        ("people: anna", "people: cleo"),
        ("people: ben", "people: cleo"),
        ("people", "model"),
    ]
    assert pairs[-1].agreed.value == 5 / 6  # anna's votes are the majority's
    assert (raters.num_raters, raters.num_items) == (3, 6)
    by_item = np.array([[[v[i] for v in votes.values()].count(c) for c in CATEGORIES] for i in range(6)], dtype=float)
    observed = ((by_item * (by_item - 1)).sum(1) / 6).mean()
    chance = ((by_item.sum(0) / 18) ** 2).sum()
    assert raters.kappa.value == pytest.approx((observed - chance) / (1 - chance))


def test_no_majority_is_a_tie() -> None:
    item = Comparison(prompt="p", ours="a", theirs="b")
    assert majority([{item: "win"}, {item: "lose"}]) == {item: "tie"}
    assert majority([{item: "win"}, {item: "lose"}, {item: "win"}]) == {item: "win"}


def test_kappa_where_chance_alone_agrees() -> None:
    rows = [judged("win", str(i), judge=judge) for judge in ("one", "two") for i in range(5)]
    (pair,), _ = agreements(rows)
    assert pair.agreed.value == 1.0
    assert math.isnan(pair.kappa.value)
