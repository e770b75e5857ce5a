"""The KL's slope and where it is going are those of a line of least squares, by group too, also after a resume."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from megatron_gil.training.ppo.trends import AHEAD, WINDOW, KlTrends, slope_of

BOTH = {f"policy/kl_{name}{ending}" for name in ("slope", "ahead") for ending in ("", "_group_0")}


def _rows(count: int) -> list[dict[str, float]]:
    noise = random.Random(3)
    return [
        {
            "policy/kl": 9.0,
            "policy/kl_sequence": noise.random() + 0.1 * i,
            "policy/kl_group_0": 5 * noise.random(),
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("values", [[1.0, 3.0], [2.0, 2.0, 2.0], [0.5, -1.0, 4.0, 2.5]])
def test_a_slope_is_that_of_numpys_fit(values: list[float]) -> None:
    assert slope_of(values) == pytest.approx(np.polyfit(range(len(values)), values, 1)[0], abs=1e-12)


def test_they_are_of_the_last_iterations_and_absent_before_there_are_as_many() -> None:
    trends, rows = KlTrends(), _rows(WINDOW + 5)
    for step, row in enumerate(rows):
        found = trends.add(row)
        if step < WINDOW - 1:
            assert found == {}
            continue
        last = rows[step - WINDOW + 1 : step + 1]
        kls = {"": [r["policy/kl_sequence"] for r in last], "_group_0": [r["policy/kl_group_0"] for r in last]}
        assert found.keys() == BOTH
        for ending, values in kls.items():
            line = np.polyfit(range(WINDOW), values, 1)
            assert found[f"policy/kl_slope{ending}"] == pytest.approx(line[0])
            assert found[f"policy/kl_ahead{ending}"] == pytest.approx(np.polyval(line, WINDOW - 1 + AHEAD))


@pytest.mark.parametrize("gone", [{"policy/kl_group_0": math.nan}, {}])
def test_a_group_without_a_kl_begins_anew(gone: dict[str, float]) -> None:
    """No row is in it, so its metric is absent; or one of its rows has a KL that is not a number."""
    trends, rows = KlTrends(), _rows(2 * WINDOW)
    rows[WINDOW] = {"policy/kl_sequence": 1.0, **gone}
    names = [trends.add(row).keys() for row in rows]
    assert [found == BOTH for found in names] == [False] * (WINDOW - 1) + [True] + [False] * WINDOW
    assert all("policy/kl_ahead" in found for found in names[WINDOW - 1 :])


def test_a_resumed_one_goes_on() -> None:
    trends, resumed, rows = KlTrends(), KlTrends(), _rows(WINDOW + 3)
    for row in rows[: WINDOW - 2]:
        trends.add(row)
    resumed.load_state(json.loads(json.dumps(trends.state())))
    for row in rows[WINDOW - 2 :]:
        assert resumed.add(row) == trends.add(row)
    assert resumed.state() == trends.state()
