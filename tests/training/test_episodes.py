"""An alarm ends only when its number is clearly back, and stays back for a while."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest

from megatron_gil.training.ppo.episodes import RELEASE, RELEASE_AFTER, Episodes


def _run(levels: list[float]) -> tuple[list[int], list[int]]:
    """The iterations in which the alarm begins, and those in which it stands."""
    episodes, begun, stood = Episodes(), [], []
    for step, level in enumerate(levels):
        if episodes.begins("kl", level):
            begun.append(step)
        if episodes.stands("kl"):
            stood.append(step)
    return begun, stood


def test_it_begins_above_the_threshold_and_ends_once_it_has_been_clearly_back() -> None:
    assert _run([0.9, 1.0, 1.1, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 1.2]) == ([2, 9], [2, 3, 4, 5, 6, 9])
    assert (RELEASE, RELEASE_AFTER) == (0.8, 5)


@pytest.mark.parametrize("back", [0.8, 0.99, 1.5, math.nan])
def test_what_is_not_clearly_back_begins_the_count_anew(back: float) -> None:
    assert _run([1.1, *[0.7] * 4, back, *[0.7] * 6]) == ([0], list(range(10)))


def test_a_number_that_hovers_at_its_threshold_speaks_once() -> None:
    noise = random.Random(1)
    hovering = [1.01] + [1 + noise.uniform(-0.25, 0.25) for _ in range(300)]
    assert _run(hovering)[0] == [0]
    assert sum(level > 1 >= before for before, level in itertools.pairwise(hovering)) > 50


def test_a_nan_begins_nothing_and_alarms_do_not_meet() -> None:
    episodes = Episodes()
    assert not episodes.begins("kl", math.nan)
    assert episodes.begins("kl", 2.0)
    assert not episodes.begins("entropy", 0.5)
    assert not episodes.stands("entropy")
    assert episodes.stands("kl")


def test_a_resumed_one_goes_on_to_count() -> None:
    episodes, resumed = Episodes(), Episodes()
    for level in (1.5, 0.7, 0.7):
        episodes.begins("kl", level)
    resumed.load_state(json.loads(json.dumps(episodes.state())))
    for stands in (True, True, False):
        for each in (episodes, resumed):
            assert not each.begins("kl", 0.7)
            assert each.stands("kl") == stands
