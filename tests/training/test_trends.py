"""The slope of the KL is that of a line of least squares, of the batch and by group, also after a resume."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from megatron_gil.training.ppo.trends import WINDOW, KlTrends, slope


def _kls(count: int) -> list[dict[str, float]]:
    noise = random.Random(3)
    return [
        {"policy/kl_sequence": noise.random() + 0.1 * i, "policy/kl_group_0": noise.random(), "policy/kl": 9.0}
        for i in range(count)
    ]


@pytest.mark.parametrize("values", [[1.0, 3.0], [2.0, 2.0, 2.0], [0.5, -1.0, 4.0, 2.5]])
def test_a_slope_is_that_of_numpys_fit(values: list[float]) -> None:
    assert slope(values) == pytest.approx(np.polyfit(range(len(values)), values, 1)[0], abs=1e-12)


def test_it_is_of_the_last_iterations_and_absent_before_there_are_as_many() -> None:
    trends, rows = KlTrends(), _kls(WINDOW + 5)
    for step, row in enumerate(rows):
        found = trends.add(row)
        if step < WINDOW - 1:
            assert found == {}
            continue
        last = rows[step - WINDOW + 1 : step + 1]
        assert found == {
            "policy/kl_slope": slope([r["policy/kl_sequence"] for r in last]),
            "policy/kl_slope_group_0": slope([r["policy/kl_group_0"] for r in last]),
        }


@pytest.mark.parametrize("gone", [{"policy/kl_group_0": math.nan}, {}])
def test_a_group_without_a_kl_begins_anew(gone: dict[str, float]) -> None:
    """No row is in it, so its metric is absent; or one of its rows has a KL that is not a number."""
    trends, rows = KlTrends(), _kls(2 * WINDOW)
    rows[WINDOW] = {"policy/kl_sequence": 1.0, **gone}
    names = [trends.add(row).keys() for row in rows]
    both = {"policy/kl_slope", "policy/kl_slope_group_0"}
    assert [found == both for found in names] == [False] * (WINDOW - 1) + [True] + [False] * WINDOW
    assert all("policy/kl_slope" in found for found in names[WINDOW - 1 :])


def test_a_resumed_one_goes_on() -> None:
    trends, resumed, rows = KlTrends(), KlTrends(), _kls(WINDOW + 3)
    for row in rows[: WINDOW - 2]:
        trends.add(row)
    resumed.load_state(json.loads(json.dumps(trends.state())))
    for row in rows[WINDOW - 2 :]:
        assert resumed.add(row) == trends.add(row)
    assert resumed.state() == trends.state()
