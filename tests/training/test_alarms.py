"""Alarms tell numbers, once per episode: against the first iteration, the last ones, or the reward model's training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_gil.config import AlarmSection, ConfigError
from megatron_gil.training.ppo.alarms import Alarms
from megatron_gil.training.ppo.episodes import RELEASE_AFTER
from tests.ranks import run_ranks
from tests.training.running import DP2, TP2, parallel

FIRST = {
    "policy/entropy": 2.0,
    "policy/kl_sequence": 0.0,
    "policy/kl_ahead": 0.0,
    "policy/kl_weight": 1.0,
    "policy/kl_group_0": 0.0,
    "policy/kl_group_1": 0.0,
    "group/mass_0": 0.5,
    "group/mass_1": 0.5,
    "group/information": 0.5,
    "response/tokens": 20.0,
    "response/duplicate_fraction": 0.0,
    "reward/out_of_range_fraction": 0.0,
    "policy/sampling_mismatch": 0.02,
}
SECTION = AlarmSection(
    max_kl=50,
    kl_spike=2,
    kl_ahead=0.7,
    group_information=0.02,
    out_of_range_fraction=0.2,
    entropy_fraction=0.1,
    length_factor=3,
    duplicate_fraction=0.5,
    sampling_mismatch=0.1,
)
BAD = [
    ("group_mass", {"group/mass_1": 0.01}, "group 1 has 1.00% of the batch, below gil.min_group_mass=0.02"),
    ("group_information", {"group/information": 0.001}, "the classifier tells 0.10% of what it could"),
    ("duplicates", {"response/duplicate_fraction": 0.6}, "60% of the responses"),
    ("score", {"reward/out_of_range_fraction": 0.25}, "25% of the scores lie outside [-1, 2], what the reward model"),
    ("entropy", {"policy/entropy": 0.19}, "entropy 0.19 nats a token, 2 at first"),
    ("length", {"response/tokens": 61.0}, "responses have 61 tokens, 20 at first"),
    ("length", {"response/tokens": 6.0}, "responses have 6 tokens"),
    (
        "sampling_mismatch",
        {"policy/sampling_mismatch": 0.22},
        "0.22 nats a token away from the log-probs that PPO uses: sa",
    ),
    (
        "kl_ahead",
        {"policy/kl_sequence": 2.5, "policy/kl_ahead": 28.8},
        "KL 2.5 nats a response will be 28.8 in 20 iterations if it goes on as in the last 15: 72% of the 40 nats",
    ),
    ("kl_spike", {"policy/kl_group_1": 6.5}, "KL 6.5 nats a response (policy/kl_group_1) is 2.2 times the 3 of late"),
]
NAMES = {
    "kl",
    "kl_spike",
    "kl_ahead",
    "group_mass",
    "group_information",
    "duplicates",
    "score",
    "entropy",
    "length",
    "sampling_mismatch",
}
QUIET = {f"alarm/{name}": 0.0 for name in NAMES}


def _alarms(section: AlarmSection = SECTION, score_range: tuple[float, float] | None = (-1.0, 2.0)) -> Alarms:
    return Alarms(section, min_group_mass=0.02, score_range=score_range, truncations=["sampling.top_p=0.9"])


@pytest.mark.parametrize(("name", "changes", "text"), BAD)
def test_an_alarm_is_raised_alone_and_said_once(name: str, changes: dict[str, float], text: str) -> None:
    alarms = _alarms()
    assert alarms.check(FIRST) == QUIET
    for episode in range(2):
        assert alarms.check(FIRST | changes) == QUIET | {f"alarm/{name}": 1.0}
        assert alarms.check(FIRST | changes) == QUIET | {f"alarm/{name}": 1.0}
        lines = alarms.take_lines()
        assert len(lines) == 1, episode
        assert text in lines[0]
        for quiet in range(1, RELEASE_AFTER + 1):
            assert alarms.check(FIRST) == QUIET | {f"alarm/{name}": float(quiet < RELEASE_AFTER)}
    assert alarms.take_lines() == []


def _slow(kl: float) -> dict[str, float]:
    return FIRST | {"policy/kl_sequence": kl / 2, "policy/kl_group_0": 1.0, "policy/kl_group_1": kl}


def test_a_kl_that_grows_slowly_is_no_spike_but_may_be_too_large() -> None:
    alarms = _alarms()
    for step in range(90):
        found = alarms.check(_slow(1.05**step))
        assert found == QUIET | {"alarm/kl": float(1.05**step > 50)}, step
    (line,) = alarms.take_lines()
    assert "(policy/kl_group_1) is above alarms.max_kl=50" in line


def test_a_leap_of_one_group_is_a_spike_until_its_mean_has_followed() -> None:
    """The oracle: mean <- 0.9 mean + 0.1 KL; a spike begins above 2 max(mean, 3) and is over after 5 iterations below
    0.8 times that."""
    alarms, mean = _alarms(), 5.0
    for _ in range(40):
        assert alarms.check(_slow(5.0)) == QUIET
    back = 0
    raised: list[bool] = []
    for _ in range(20):
        back += 0.8 * 2 * mean > 20.0
        found = alarms.check(_slow(20.0))
        assert found == QUIET | {"alarm/kl_spike": float(back < 5)}
        raised.append(bool(found["alarm/kl_spike"]))
        mean = 0.9 * mean + 2.0
    assert (raised[0], raised[-1], sum(raised)) == (True, False, 11)


def test_where_the_kl_is_going_is_not_known_at_once() -> None:
    alarms = _alarms()
    unknown = {name: value for name, value in FIRST.items() if name != "policy/kl_ahead"}
    assert alarms.check(unknown) == QUIET
    assert alarms.check(unknown | {"policy/kl_ahead": 30.0, "policy/kl_ahead_group_0": 1.0})["alarm/kl_ahead"]
    for _ in range(RELEASE_AFTER + 1):
        assert alarms.check(unknown)["alarm/kl_ahead"], "an alarm that stands does not end by a number that is missing"
    assert not _alarms().check(FIRST | {"policy/kl_ahead_group_0": 30.0})["alarm/kl_ahead"]


def test_a_group_of_no_mass_has_no_kl_and_one_that_warms_up_may_know_nothing() -> None:
    alarms = _alarms()
    alarms.check(FIRST)
    empty = FIRST | {"group/mass_1": 0.001, "policy/kl_group_1": 70.0, "group/information": 0.0}
    assert alarms.check(empty) == QUIET | {"alarm/group_mass": 1.0}
    del empty["policy/kl_group_1"]  # no mass at all
    assert alarms.check(empty) == QUIET | {"alarm/group_mass": 1.0}
    alarms = _alarms()
    alike = FIRST | {"group/information": 0.0}
    assert alarms.check(alike, warming_up=True) == QUIET
    assert alarms.check(alike) == QUIET | {"alarm/group_information": 1.0}


def test_zero_switches_off_and_one_group_has_no_mass() -> None:
    section = AlarmSection(**dict.fromkeys(AlarmSection.__slots__, 0))
    one_group = {name: value for name, value in FIRST.items() if "group" not in name}
    assert _alarms(section).check(one_group) == {}
    assert _alarms().check(one_group).keys() == {f"alarm/{n}" for n in NAMES if not n.startswith("group_")}
    with pytest.raises(ConfigError, match=r"alarms\.max_kl=-1"):
        replace(section, max_kl=-1)


ALONE: Any = SimpleNamespace(world_size=1, tp_rank=0)
SCORES = [0.0, -1.0, 2.0, 2.1, -7.0, math.nan]


def _share(layout: dict[str, Any]) -> tuple[float, ...]:
    with parallel(layout) as started:
        mine = slice(started.dp_rank, None, started.dp_size)
        scores = torch.tensor(SCORES, dtype=torch.float64)[mine]
        first = _alarms(score_range=None)
        return (
            _alarms().out_of_range_fraction(scores, started),
            first.out_of_range_fraction(scores[: 6 // started.dp_size - 1], started),  # NaN is left out, or 2.1 too
            first.out_of_range_fraction(scores, started),
        )


@pytest.mark.parametrize("layout", [DP2, TP2])
def test_scores_are_counted_over_all_ranks(layout: dict[str, Any]) -> None:
    """Range [-1, 2]: 2.1, -7 and NaN lie outside. Of the first scores, [-7, 2.1] or, over two ranks, [-7, 2]."""
    assert _alarms().out_of_range_fraction(torch.tensor(SCORES), ALONE) == 3 / 6
    found = run_ranks(_share, 2, layout)
    assert found[0] == found[1]
    assert found[0][0] == 3 / 6


def test_what_a_checkpoint_holds_is_enough() -> None:
    alarms, resumed = _alarms(score_range=None), _alarms(score_range=None)
    alarms.out_of_range_fraction(torch.tensor([-1.0, 2.0]), ALONE)
    for kl in (0.0, 9.0, 4.0):
        alarms.check(FIRST | {"policy/kl_group_0": kl, "response/duplicate_fraction": 0.6 * (kl == 9.0)})
    resumed.load_state(json.loads(json.dumps(alarms.state())))
    later = FIRST | {"policy/entropy": 0.1, "policy/kl_group_0": 6.1, "policy/kl_sequence": math.nan}
    assert (
        resumed.check(later)
        == alarms.check(later)
        == QUIET | dict.fromkeys(("alarm/entropy", "alarm/kl_spike", "alarm/duplicates"), 1.0)
    )
    assert (len(alarms.take_lines()), len(resumed.take_lines())) == (3, 1), "what stood before is not said again"
    assert resumed.state() == alarms.state()
    assert resumed.out_of_range_fraction(torch.tensor([3.0, 0.0]), ALONE) == 0.5
