"""The paragraph above the demo's tables says what the numbers say, whatever they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_gil.demo.takeaway import takeaway
from megatron_gil.evaluation.statistics import Estimate
from megatron_gil.evaluation.winrate import WinRate

NOTHING = Estimate(value=0.0, low=0.0, high=0.0)
RATE = WinRate(
    num_prompts=9, win=NOTHING, tie=NOTHING, lose=NOTHING, margin=NOTHING, sign_test=1.0, refused=0, unanswered=0
)


def rate(value: float, low: float, high: float) -> WinRate:
    return replace(RATE, margin=Estimate(value=value, low=low, high=high))


def said(published: WinRate, recommended: WinRate, ppo: float = 0.2, drift: float = 2.0) -> list[str]:
    methods = ("sft", "ppo", "ppo_kl", "ppo_gil", "ppo_gil_targets")
    text = takeaway(
        gold=dict(zip(methods, (0.4, ppo, 0.5, 0.45, 0.55), strict=True)),
        proxy=dict(zip(methods, (0.1, 1.2, 0.8, 0.9, 0.7), strict=True)),
        heldout=dict(zip(methods, (0.1, 0.1, 0.15, 0.2, 0.25), strict=True)),
        published=published,
        recommended=recommended,
        kl={"ppo_kl": 2.0, "ppo_gil": drift, "ppo_gil_targets": 1.5},
    )
    return text.split(". ")


def test_a_win_a_loss_and_a_tie_are_called_so() -> None:
    lines = said(rate(-0.097, -0.169, -0.028), rate(0.1, 0.02, 0.2))
    assert lines[2].startswith("PPO-GIL as published is worse than PPO w/ KL (win - lose -9.7 [-16.9, -2.8] %)")
    assert "recommended setting, is better than PPO w/ KL (win - lose +10.0 [+2.0, +20.0] %" in lines[3]
    assert lines[3].endswith("its gold is 0.25 against 0.15)")
    assert "neither better nor worse" in said(RATE, RATE)[2]


@pytest.mark.parametrize(("ppo", "hacks"), [(0.2, True), (0.5, False)])
def test_hacking_is_a_higher_score_and_a_lower_worth(ppo: float, hacks: bool) -> None:
    first = said(RATE, RATE, ppo=ppo)[0]
    assert first.startswith("PPO without KL takes the reward model's score from 0.10 to 1.20 and gold from 0.40 to")
    assert ("hacks the reward model" in first) == hacks


@pytest.mark.parametrize(("drift", "named"), [(15.6, True), (3.0, False)])
def test_a_policy_that_went_far_is_named(drift: float, named: bool) -> None:
    line = said(RATE, RATE, drift=drift)[2]
    assert (f"the policy is {drift:.1f} nats a response from SFT, not 2.0" in line) == named
