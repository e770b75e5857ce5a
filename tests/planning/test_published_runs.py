"""The time model against published runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import published_runs
from published_runs import RUNS, PublishedRun, error, predict

from megatron_gil.planning.hardware import Assumptions
from megatron_gil.planning.memory import Cut, num_parameters


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.name} on {run.num_gpus}")
def test_predicted_within_a_factor_of_about_two(run: PublishedRun) -> None:
    """docs/planning.md says so."""
    cut, time, _ = predict(run, Assumptions())
    assert cut.num_gpus == run.num_gpus
    assert -0.5 < error(run, time) < 1.0


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.name} on {run.num_gpus}")
def test_sizes_are_those_of_the_models_name(run: PublishedRun) -> None:
    billions = float(run.name.replace("-", " ").split()[-1].removesuffix("B"))
    policy = run.workload().models[0]
    assert num_parameters(policy, Cut(), 0) == pytest.approx(billions * 1e9, rel=0.03)


def test_the_table_prints_an_error_for_each() -> None:
    lines = published_runs.table(RUNS, Assumptions()).splitlines()
    rows = [line for line in lines if line.startswith(("| DeepSpeed-Chat", "| NeMo-RL"))]
    assert len(rows) == len(RUNS) >= 4
    assert all(line.count("%") == 1 for line in rows)
    assert lines[-1].startswith("Median error ")
