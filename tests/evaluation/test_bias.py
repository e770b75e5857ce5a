"""Position and length: simulated judges whose bias is known, and the fit against another optimiser."""

import math
import random
from typing import Literal

import numpy as np
import pytest
import torch

from megatron_gil.evaluation.bias import PRIOR_VARIANCE, fit_logistic, length_bias, position_bias
from megatron_gil.evaluation.comparisons import Judgment
from tests.evaluation.judged import judged


def test_position_counts() -> None:
    """Two that follow the place, one the text, one that ties once; and what says no order is left out."""
    found = position_bias(
        [
            judged("tie", "1", ours_first="win", theirs_first="lose"),  # the first place, both times
            judged("tie", "2", ours_first="win", theirs_first="lose"),
            judged("win", "3", ours_first="win", theirs_first="win"),  # ours, both times
            judged("tie", "4", ours_first="tie", theirs_first="win"),  # the second place where there was a winner
            judged("win", "5"),
        ]
    )
    assert found is not None
    assert found.first.value == (1 + 1 + 0.5 + 0) / 4
    assert found.sign_test == 1.0  # 2 against 1
    assert (found.both_orders, found.consistent.value) == (4, 0.25)
    assert position_bias([judged("win")]) is None


@pytest.mark.parametrize("first_wins", [0.5, 0.8])
def test_position_of_people(first_wins: float) -> None:
    """One order each: a rater who takes the first of the two more often than not is found."""
    rng = random.Random(1)
    rows = []
    for i in range(400):
        won = rng.random() < first_wins
        if rng.random() < 0.5:
            verdict: Literal["win", "lose"] = "win" if won else "lose"
            rows.append(judged(verdict, str(i), ours_first=verdict))
        else:
            verdict = "lose" if won else "win"
            rows.append(judged(verdict, str(i), theirs_first=verdict))
    found = position_bias(rows)
    assert found is not None
    assert found.both_orders == 0
    assert math.isnan(found.consistent.value)
    assert found.first.low < first_wins < found.first.high
    assert (found.sign_test < 0.001) == (first_wins == 0.8)


def _fit_by_torch(x: np.ndarray, won: np.ndarray, weights: np.ndarray) -> list[float]:
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = theta[0] + theta[1] * torch.tensor(x)
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(won), reduction="none")
        loss = (torch.tensor(weights) * each).sum() + (theta**2).sum() / (2 * PRIOR_VARIANCE)
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta.tolist()


def test_fit_against_another_optimiser() -> None:
    rng = np.random.default_rng(0)
    x = np.tanh(rng.normal(size=60))
    won = rng.choice([0.0, 0.5, 1.0], size=60)
    weights = rng.integers(0, 4, size=(3, 60)).astype(float)
    a, b = fit_logistic(x, won, weights)
    for draw in range(3):
        assert [a[draw], b[draw]] == pytest.approx(_fit_by_torch(x, won, weights[draw]), abs=1e-7)


def test_fit_of_what_a_line_parts_is_finite() -> None:
    """All won, all lost, and won just where x is positive: without the prior there would be no maximum."""
    x = np.linspace(-1, 1, 40)
    for won in (np.ones(40), np.zeros(40), (x > 0).astype(float)):
        a, b = fit_logistic(x, won, np.ones((1, 40)))
        assert np.isfinite([a, b]).all()
        p = 1 / (1 + np.exp(-(a[0] + b[0] * x)))
        assert np.abs(p - won).mean() < 0.05


def _judged_by(prefers_ours: float, prefers_longer: float, *, seed: int = 0) -> list[Judgment]:
    """Ours are 40 characters longer on average."""
    rng = np.random.default_rng(seed)
    lengths = np.stack([rng.integers(60, 341, 600), rng.integers(20, 301, 600)], axis=1)
    logits = prefers_ours + prefers_longer * np.tanh((lengths[:, 0] - lengths[:, 1]) / 115)
    wins = rng.random(600) < 1 / (1 + np.exp(-logits))
    return [
        judged("win" if won else "lose", str(i), ours="x" * int(ours), theirs="y" * int(theirs))
        for i, ((ours, theirs), won) in enumerate(zip(lengths, wins, strict=True))
    ]


def test_a_judge_of_length_alone_is_even_at_equal_length() -> None:
    found = [bias for seed in range(10) if (bias := length_bias(_judged_by(0.0, 3.0, seed=seed))) is not None]
    assert all(bias.win_rate.low > 0.52 for bias in found)
    assert sum(bias.controlled.low < 0.5 < bias.controlled.high for bias in found) >= 8
    assert np.mean([bias.controlled.value for bias in found]) == pytest.approx(0.5, abs=0.03)
    assert all(bias.slope.low > 1.0 for bias in found)
    rates = [part.win_rate.value for part in found[0].bins]
    assert len(rates) == 5
    assert rates == sorted(rates)
    assert [part.num_prompts for part in found[0].bins] == pytest.approx([120] * 5, abs=6)
    assert all(a.longest < b.shortest for a, b in zip(found[0].bins, found[0].bins[1:], strict=False))


def test_a_judge_that_does_not_mind_length() -> None:
    found = length_bias(_judged_by(0.8, 0.0))
    assert found is not None
    assert found.controlled.value == pytest.approx(found.win_rate.value, abs=0.02)
    assert found.controlled.low < 1 / (1 + math.exp(-0.8)) < found.controlled.high
    assert found.slope.low < 0 < found.slope.high


def test_length_where_there_is_little() -> None:
    assert length_bias([judged("refused")]) is None
    one = length_bias([judged("win", ours="same", theirs="size")])
    assert one is not None
    assert len(one.bins) == 1
    assert one.controlled.value > 0.9


def test_repeats_of_a_prompt_are_resampled_together() -> None:
    """One prompt judged a hundred times and one judged once: two things that a draw may hold."""
    rows = [judged("win", "often", ours="x" * i) for i in range(100)] + [judged("lose", "once")]
    found = length_bias(rows)
    assert found is not None
    assert (found.win_rate.value, found.win_rate.low, found.win_rate.high) == (0.5, 0.0, 1.0)
    assert found.controlled.high - found.controlled.low > 0.8
