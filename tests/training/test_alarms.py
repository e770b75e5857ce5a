"""Alarms tell numbers, once per episode, against the first iteration."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_gil.config import AlarmSection, ConfigError
from megatron_gil.training.alarms import Alarms, duplicate_fraction
from megatron_gil.types import Rollout
from tests.ranks import run_ranks
from tests.training.running import DP2, TP2, parallel

FIRST = {
    "reward/score_mean": 0.5,
    "reward/score_std": 0.25,
    "policy/entropy": 2.0,
    "policy/kl_sequence": 0.0,
    "policy/kl_weight": 1.0,
    "policy/kl_group_0": 0.0,
    "policy/kl_group_1": 0.0,
    "group/mass_0": 0.5,
    "group/mass_1": 0.5,
    "response/tokens": 20.0,
    "response/duplicate_fraction": 0.0,
}
BAD = [
    ("kl", {"policy/kl_group_1": 51.0}, "KL 51 nats a reply (policy/kl_group_1) is above alarms.max_kl=50"),
    ("kl", {"policy/kl_sequence": 80.0}, "KL 80 nats a reply (policy/kl_sequence)"),
    ("group_mass", {"group/mass_1": 0.01}, "group 1 has 1.00% of the batch, below gil.min_group_mass=0.02"),
    ("duplicates", {"response/duplicate_fraction": 0.6}, "60% of the replies"),
    ("score", {"reward/score_mean": 1.6}, "score 1.6 is more than 4 standard deviations (0.25)"),
    ("score", {"reward/score_mean": -0.6}, "score -0.6"),
    ("entropy", {"policy/entropy": 0.19}, "entropy 0.19 nats a token, 2 at first"),
    ("length", {"response/tokens": 61.0}, "replies have 61 tokens, 20 at first"),
    ("length", {"response/tokens": 6.0}, "replies have 6 tokens"),
]
NAMES = {"kl", "group_mass", "duplicates", "score", "entropy", "length"}


@pytest.mark.parametrize(("name", "changes", "text"), BAD)
def test_an_alarm_is_raised_alone_and_said_once(name: str, changes: dict[str, float], text: str) -> None:
    alarms = Alarms(AlarmSection(), min_group_mass=0.02)
    quiet = {f"alarm/{n}": 0.0 for n in NAMES}
    assert alarms.check(FIRST) == quiet
    for episode in range(2):
        assert alarms.check(FIRST | changes) == quiet | {f"alarm/{name}": 1.0}
        assert alarms.check(FIRST | changes) == quiet | {f"alarm/{name}": 1.0}
        lines = alarms.take_lines()
        assert len(lines) == 1, episode
        assert text in lines[0]
        assert alarms.check(FIRST) == quiet
    assert alarms.take_lines() == []


def test_the_baseline_is_the_first_iteration_and_is_restored() -> None:
    alarms, resumed = (Alarms(AlarmSection(), min_group_mass=0.02) for _ in range(2))
    alarms.check(FIRST)
    resumed.baseline = dict(alarms.baseline)
    later = FIRST | {"policy/entropy": 0.1}
    assert resumed.check(later) == alarms.check(later)
    assert resumed.check(later)["alarm/entropy"] == 1.0


def test_zero_switches_off_and_one_group_has_no_mass() -> None:
    section = AlarmSection(max_kl=0, score_deviations=0, entropy_fraction=0, length_factor=0, duplicate_fraction=0)
    one_group = {name: value for name, value in FIRST.items() if not name.startswith("group/")}
    assert Alarms(section, min_group_mass=0.02).check(one_group) == {}
    with pytest.raises(ConfigError, match=r"alarms\.max_kl=-1"):
        replace(section, max_kl=-1)


def _rollout(replies: list[list[int]], row_ids: list[int]) -> Rollout:
    """Prompts of lengths 1, 2, 3, ... with those replies."""
    width = 12
    prompt_lengths = torch.arange(1, len(replies) + 1)
    tokens = torch.zeros(len(replies), width, dtype=torch.long)
    for row, reply in enumerate(replies):
        tokens[row, : row + 1] = 50 + row
        tokens[row, row + 1 : row + 1 + len(reply)] = torch.tensor(reply)
    lengths = prompt_lengths + torch.tensor([len(reply) for reply in replies])
    others: Any = dict.fromkeys(("response_mask", "sampled_log_probs", "finished", "sample_ids", "known_groups"))
    return Rollout(
        tokens=tokens, lengths=lengths, prompt_lengths=prompt_lengths, row_ids=torch.tensor(row_ids), **others
    )


REPLIES = [[1, 2, 3], [1, 2, 3], [3, 2, 1], [1, 2], [1, 2], [1, 2, 3]]
ROW_IDS = [7, 8, 9, 4, 4, 7]
"""[1, 2, 3] answers prompts 7 (twice) and 8; [1, 2] answers prompt 4 twice, which is no duplicate."""


def _share(layout: dict[str, Any]) -> float:
    with parallel(layout) as started:
        mine = slice(started.dp_rank, None, started.dp_size)
        return duplicate_fraction(_rollout(REPLIES[mine], ROW_IDS[mine]), started)


def test_duplicates_are_counted_over_all_ranks() -> None:
    alone: Any = SimpleNamespace(world_size=1)
    assert duplicate_fraction(_rollout(REPLIES, ROW_IDS), alone) == 3 / 6
    for layout in (DP2, TP2):
        assert run_ranks(_share, 2, layout) == [3 / 6] * 2
