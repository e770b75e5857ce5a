"""SIGTERM, SIGINT and SIGUSR1 in every phase of every stage: exit 75, and the run goes on to the same last bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.running import STOPS, Answer, Call, Interruption, arguments, call_all, check_equal
from tests.ranks import run_ranks

START = ("checking the data", "looking for a checkpoint")
ROUND = ("beginning iteration", "evaluation", "saving")
PHASES = {
    "sft": (*START, "building policy", *ROUND, "scoring", "policy update"),
    "reward": (*START, "building reward_model", *ROUND, "scoring", "reward_model update"),
    "dpo": (*START, "building policy", "building ref_policy", *ROUND, "scoring", "policy update"),
    "ppo": (
        *START,
        *(f"building {role}" for role in ("policy", "critic", "classifier", "ref_policy", "reward_model")),
        *ROUND,
        "rollout",
        *(f"scoring by {role}" for role in ("policy", "critic", "classifier", "ref_policy", "reward_model")),
        "shaping",
        "critic warm-up",
        "classifier update",
        "critic update",
        "policy update",
        "evaluation by reward_model",
    ),
}
Cell = tuple[str, str, signal.Signals]
CELLS = [
    pytest.param(
        stage,
        phase,
        number,
        marks=[] if (place + shift) % len(STOPS) == 0 else [pytest.mark.long],
        id=f"{stage}-{phase.replace(' ', '_')}-{number.name}",
    )
    for stage, phases in PHASES.items()
    for place, phase in enumerate(phases)
    for shift, number in enumerate(STOPS)
]
"""Every phase with one of the signals in `make test`, with all three in `make faults`."""


@pytest.fixture(scope="module")
def wholes(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Answer]]:
    """Each stage without interruption: its run directory and its answer."""
    directory = tmp_path_factory.mktemp("whole")
    calls = [Call(arguments(stage, world, directory / stage)) for stage in PHASES]
    answers = run_ranks(call_all, 2, calls, world)[0]
    return {stage: (directory / stage, answer) for stage, answer in zip(PHASES, answers, strict=True)}


@pytest.mark.parametrize("stage", PHASES)
def test_the_table_has_every_phase(stage: str, wholes: dict[str, tuple[Path, Answer]]) -> None:
    answer = wholes[stage][1]
    assert answer.code == 0, answer.stderr
    assert set(answer.phases) == set(PHASES[stage])


@pytest.fixture(scope="module")
def stopped_runs(
    request: pytest.FixtureRequest,
    wholes: dict[str, tuple[Path, Answer]],
    world: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Cell, tuple[Path, list[Answer], list[Answer]]]:
    """Of every cell that this session tests: its run directory, what the ranks answered to the stop, and to the same
    command again. All in one pair of processes, for starting one takes longer than such a run."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    ours = [item for item in items if item.originalname == "test_a_stop_loses_nothing"]
    params: list[Any] = [item.callspec.params for item in ours]
    cells: list[Cell] = [(each["stage"], each["phase"], each["number"]) for each in params]
    directory = tmp_path_factory.mktemp("stopped")
    calls = []
    for place, (stage, phase, number) in enumerate(cells):
        occurrence = 2 if wholes[stage][1].phases.count(phase) > 2 else 1
        run = arguments(stage, world, directory / str(place))
        calls.append(Call(run, Interruption(phase, occurrence, number, rank=1)))  # rank 0 must learn of it
        calls.append(Call(run))
    by_rank = run_ranks(call_all, 2, calls, world, timeout_s=300.0 * len(cells))
    answers = [list(ranks) for ranks in zip(*by_rank, strict=True)]
    return {
        cell: (directory / str(place), answers[2 * place], answers[2 * place + 1]) for place, cell in enumerate(cells)
    }


def test_a_stop_while_models_wait_on_the_host(
    wholes: dict[str, tuple[Path, Answer]], world: Path, tmp_path: Path
) -> None:
    """The optimizers' states come back to be saved, and the run ends as one where they never left."""
    phases = ("rollout", "scoring by ref_policy", "evaluation")
    calls = []
    for place, phase in enumerate(phases):
        run = arguments("ppo", world, tmp_path / str(place), "models.offload=all")
        calls += [Call(run, Interruption(phase, 3, signal.SIGTERM, rank=1)), Call(run)]
    for answers in run_ranks(call_all, 2, calls, world):
        assert [answer.code for answer in answers] == [75, 0] * len(phases), answers[0].stderr
    for place in range(len(phases)):
        check_equal(tmp_path / str(place), wholes["ppo"][0])


@pytest.mark.parametrize(("stage", "phase", "number"), CELLS)
def test_a_stop_loses_nothing(
    stage: str,
    phase: str,
    number: signal.Signals,
    wholes: dict[str, tuple[Path, Answer]],
    stopped_runs: dict[Cell, tuple[Path, list[Answer], list[Answer]]],
) -> None:
    directory, stopped, resumed = stopped_runs[stage, phase, number]
    assert [answer.code for answer in stopped] == [75, 75], stopped[0].stderr
    assert f"stopped by {number.name}" in stopped[0].stderr
    assert [answer.code for answer in resumed] == [0, 0], resumed[0].stderr
    check_equal(directory, wholes[stage][0])
