"""KL targets from trusted numbers: who is on which side, what follows, and what is said where too little is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from megatron_gil.evaluation.audit.advice import ONE_KL_FROM, Agreement
from megatron_gil.evaluation.audit.rows import TrustedRow
from megatron_gil.evaluation.audit.tables import reach_table
from megatron_gil.evaluation.audit.targets import (
    HIGH,
    LEAST_TARGET,
    LOW,
    SplitPrompts,
    advise_targets,
    agreement_on_high,
    price_of,
    split_at,
    split_prompts,
)
from megatron_gil.evaluation.best_of_n import KlPrice, kl_of_best_of
from megatron_gil.evaluation.report.figures import colors, to_svg
from megatron_gil.evaluation.report.reach_figure import reach_picture
from megatron_gil.evaluation.statistics import Estimate


def agreement(value: float, half: float = 0.05) -> Agreement:
    return Agreement(value=Estimate(value=value, low=value - half, high=value + half), num_rows=96)


LITTLE = agreement(ONE_KL_FROM - 0.1)


def rows(of_high: float, of_low: float, *, prompts: int = 12, responses: int = 8) -> list[TrustedRow]:
    """Scores rise by 1 within a prompt; the trusted number rises with them up to the share `of_...` of the responses,
    then falls."""
    found = []
    for i in range(prompts):
        base, peak = (10.0, of_high) if i % 2 else (0.0, of_low)
        for k in range(responses):
            share = (k + 1) / responses
            trusted = 1 - abs(share - peak)
            found.append(TrustedRow(prompt=f"p{i}", response=f"r{k}", score=base + share, trusted=trusted, group="any"))
    return found


def price(given: list[TrustedRow]) -> KlPrice:
    return price_of(split(given))


def split(given: list[TrustedRow]) -> SplitPrompts:
    found = split_prompts(given)
    assert found is not None
    return found


def best_cut(values: list[float]) -> float:
    """The start of the upper side with the largest n_0 n_1 (mean_1 - mean_0)^2, by trying all."""
    best, where = -1.0, math.nan
    for start in sorted(set(values))[1:]:
        low, high = [v for v in values if v < start], [v for v in values if v >= start]
        between = len(low) * len(high) * (np.mean(high) - np.mean(low)) ** 2
        if between > best:
            best, where = float(between), start
    return where


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_is_the_best_of_all(seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 9, size=20).astype(float).tolist()
    assert split_at(values) == best_cut(values)


def test_prompts_are_split_by_their_mean_score() -> None:
    found = price(rows(0.8, 1.0))
    assert {name: group.num_prompts for name, group in found.groups.items()} == {LOW: 6, HIGH: 6}
    assert found.groups[LOW].best_n == 8
    assert found.groups[HIGH].best_n < 8


def test_targets_are_the_kl_of_the_best_n() -> None:
    found = price(rows(0.8, 1.0))
    advice = advise_targets(found, LITTLE)
    high, low = advice.settings["gil.kl_target_high"], advice.settings["gil.kl_target_low"]
    assert high == pytest.approx(kl_of_best_of(found.groups[HIGH].best_n), rel=0.05)
    assert low == pytest.approx(kl_of_best_of(8), rel=0.05)
    assert f"gil.kl_target_high={high:g} gil.kl_target_low={low:g}" in advice.line
    assert "8 [8, 8, the most there are of 6 prompts] for those of low score" in advice.line
    assert f"cost {found.price.value:.3f}" in advice.line
    assert advice.is_certain
    assert advice.line.endswith(".")


def test_a_reward_that_does_not_vary_where_it_is_high_is_not_called_wrong() -> None:
    """As that of a rule which all responses to the easy prompts fulfil."""
    given = [replace(row, score=10.0) if row.score > 5 else row for row in rows(0.8, 1.0)]
    high = agreement_on_high(split(given))
    advice = advise_targets(price(given), high)
    assert advice.settings["gil.kl_target_high"] == LEAST_TARGET
    assert not advice.is_certain
    assert (
        "Scores or trusted numbers are too few or do not vary in the 48 responses to the prompts of high score. gil.kl"
        in advice.line
    )
    for wrong in ("nan", "not to be trusted", "of one prompt"):
        assert wrong not in advice.line
    advice = advise_targets(price([replace(row, trusted=1.0) for row in given]), high)
    assert advice.settings == {"gil.num_groups": 1, "ppo.kl_target": LEAST_TARGET}
    assert "do not vary in the 48 responses to the prompts of high score. The reward helps in neither" in advice.line


def test_one_prompt_says_nothing_of_the_others_of_its_group() -> None:
    found = price(rows(0.8, 1.0, prompts=2)).groups[LOW]
    assert (found.num_prompts, found.best_n_low, found.best_n_high) == (1, 1, 8)


def test_groups_that_go_equally_far_need_one_target() -> None:
    advice = advise_targets(price(rows(1.0, 1.0)), LITTLE)
    assert advice.settings == {"gil.num_groups": 1, "ppo.kl_target": pytest.approx(kl_of_best_of(8), rel=0.05)}
    assert advice.is_certain
    assert "one KL will do" in advice.line


def test_a_reward_that_helps_nowhere_is_followed_hardly() -> None:
    advice = advise_targets(price(rows(0.0, 1.0)), LITTLE)
    assert advice.settings["gil.kl_target_high"] == LEAST_TARGET


def test_one_response_a_prompt_says_nothing() -> None:
    assert split_prompts(rows(0.8, 1.0, responses=3)) is None
    assert split_prompts([]) is None
    assert split_prompts(rows(0.8, 1.0, prompts=1)) is None


def test_table_and_picture_show_every_group() -> None:
    found = price(rows(0.8, 1.0))
    shown = reach_table(found)
    assert [row[0] for row in shown.rows] == [f"prompts of {HIGH}", f"prompts of {LOW}"]
    assert shown.header[2:6] == ("n = 1", "n = 2", "n = 4", "n = 8")
    assert all(len(row) == len(shown.header) for row in shown.rows)
    assert f"costs {found.price.value:.3f}" in shown.note
    svg = to_svg(reach_picture(found.groups, color=colors(tuple(found.groups))))
    assert svg.count("<path") > 10


def test_agreement_is_that_of_the_prompts_of_high_score() -> None:
    given = rows(0.3, 1.0)
    found = agreement_on_high(split(given))
    high = [row for row in given if row.score > 5]
    assert found.num_rows == len(high) == 48
    assert "Spearman's of 48 responses to the prompts of high score)" in advise_targets(price(given), found).line
    expected: Any = spearmanr([row.score for row in high], [row.trusted for row in high])[0]
    assert found.value.value == pytest.approx(expected)
    assert expected < 0  # that of all rows is above 0


def test_a_reward_that_is_trusted_where_it_is_high_needs_no_groups() -> None:
    found = price(rows(0.8, 1.0))
    advice = advise_targets(found, agreement(ONE_KL_FROM + 0.06))
    assert advice.settings == {"gil.num_groups": 1}
    assert "agreement 0.75 [0.70, 0.80], Spearman's of 96 trusted rows" in advice.line
    assert advice.is_certain
    doubtful = advise_targets(found, agreement(ONE_KL_FROM + 0.06, half=0.12))
    assert doubtful.settings == advice.settings
    assert not doubtful.is_certain
    assert doubtful.line.endswith("the interval holds 0.69; about 4 times as many in the high group would.")
