"""The curves of every trainer are those that were kept: to the last bit on one rank, up to rounding at other layouts.

After a change that is meant to change numbers: `python -m tests.golden --write`, and say why in the commit.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.golden.compare import apart
from tests.golden.runs import RUNS, Machine, read, run_all
from tests.training.running import DP2, ONE, PP2, TP2, layout_name

TOLERANCE = 1e-4
"""Of the largest value of a metric. Other layouts add the same float32 numbers in another order, other processors with
other kernels, and the updates amplify that: 2.2e-5 was the most that layouts differed by (of group/weight_std), 8e-7
the most between AVX2 and no vector instructions. A token that is sampled otherwise would be far above."""


def check(found: dict[str, Any], tolerance: float) -> None:
    assert {name: lines for name in RUNS if (lines := apart(found[name], read(name)[1], tolerance))} == {}


def test_one_rank(world: Path, tmp_path: Path) -> None:
    found, wrote = run_all(world, tmp_path, ONE), read("sft")[0]
    same = wrote == Machine.here()
    if not same:
        warnings.warn(f"compared within {TOLERANCE:g}: written by {wrote}, not {Machine.here()}", stacklevel=1)
    check(found, 0.0 if same else TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [TP2, PP2, DP2], ids=layout_name)
def test_other_layouts(layout: dict[str, Any], world: Path, tmp_path: Path) -> None:
    check(run_all(world, tmp_path, layout), TOLERANCE)


def test_every_difference_is_seen() -> None:
    rows = read("ppo_gil")[1]
    last = rows[-1]
    name = "policy/entropy"
    up = last[name] * (1 + 2.0**-52)
    assert up != last[name]
    assert apart(rows, rows, 0.0) == []
    assert apart([*rows[:-1], {**last, name: up}], rows, 0.0) == [
        f"{name} of iteration 3: {up!r} instead of {last[name]!r}"
    ]
    assert apart([*rows[:-1], {**last, name: up}], rows, TOLERANCE) == []
    assert len(apart([*rows[:-1], {**last, name: last[name] * 1.01}], rows, TOLERANCE)) == 1
    assert len(apart([*rows[:-1], {**last, "new": 1.0}], rows, TOLERANCE)) == 1
    assert len(apart([*rows[:-1], {**last, name: None}], rows, TOLERANCE)) == 1
    assert len(apart(rows[:-1], rows, TOLERANCE)) == 1
