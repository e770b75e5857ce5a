"""checkpoint.keep_best: the best checkpoint by an evaluation stays, is named, and a resumed run knows it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_gil import config as c
from megatron_gil.config.files import load_config
from megatron_gil.engine.checkpoint import CheckpointStore
from megatron_gil.training.run.best import EVAL_METRICS, Best, find_best
from megatron_gil.training.supervised.trainer import SupervisedTrainer
from tests.faults.running import Call, Interruption, arguments, call_all
from tests.ranks import run_ranks

METRIC = "eval/sft/loss"
EVALUATED = (
    "checkpoint.keep_best=-eval/sft/loss",
    "checkpoint.every=100",
    "checkpoint.keep_last=1",
    "log.eval_every=1",
)


def _call_with_losses(calls: list[Call], losses: list[float], root: Path) -> list[str]:
    """Commands whose evaluations find these losses, by iteration; what each said."""
    iterate, iterations = SupervisedTrainer.iterate, [0]

    def iterate_and_count(self: SupervisedTrainer, iteration: int) -> Any:
        iterations[0] = iteration
        return iterate(self, iteration)

    def evaluate(_: SupervisedTrainer) -> dict[str, float]:
        return {METRIC: losses[iterations[0]]}

    with (
        mock.patch.object(SupervisedTrainer, "iterate", iterate_and_count),
        mock.patch.object(SupervisedTrainer, "evaluate", evaluate),
    ):
        return [answer.stderr for answer in call_all(calls, root)]


def _kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def _state(run: Path, iteration: int) -> Any:
    text = (run / "checkpoints" / f"iter_{iteration:07}" / "state.json").read_text()
    return json.loads(text)["state"]["loop"]["best"]


def test_the_best_stays_and_is_linked(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (said,) = run_ranks(
        _call_with_losses, 1, [Call(arguments("sft", world, run, *EVALUATED))], [3.0, 1.0, 2.0, 1.5], world
    )[0]
    assert _kept(run) == ["best", "iter_0000002", "iter_0000004"]
    assert (run / "checkpoints/best").resolve().name == "iter_0000002"
    assert "iteration 2: eval/sft/loss 1 is the best so far: kept as checkpoints/best" in said
    expected = {"iteration": 2, "value": 1.0, "metric": "-eval/sft/loss"}
    assert _state(run, 2) == _state(run, 4) == expected


def test_a_resumed_run_knows_the_best(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments("sft", world, run, *EVALUATED)
    calls = [Call(command, Interruption("beginning iteration", 4, signal.SIGTERM, rank=0)), Call(command)]
    said = run_ranks(_call_with_losses, 1, calls, [3.0, 1.0, 2.0, 1.5], world)[0]
    assert "stopped by SIGTERM" in said[0]
    assert _kept(run) == ["best", "iter_0000002", "iter_0000004"]
    assert "best so far" not in said[1], "1.5 is not better than 1"


def test_the_best_of_another_metric_counts_for_nothing() -> None:
    best = find_best({"eval/a": 2.0}, 3, "eval/a", None)
    assert best == Best(iteration=3, value=2.0, metric="eval/a")
    assert find_best({"eval/a": 2.0}, 4, "eval/a", best) is best
    assert find_best({"eval/a": float("nan")}, 4, "eval/a", best) is best
    assert find_best({}, 4, "eval/a", best) is best, "no evaluation"
    assert find_best({"eval/a": 1.0}, 4, "-eval/a", best) == Best(iteration=4, value=1.0, metric="-eval/a")
    assert find_best({"eval/a": 1.0}, 4, None, best) is None


def test_a_best_that_cannot_be_saved_is_not_the_best(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments("sft", world, run, *EVALUATED, "checkpoint.on_error=continue")
    assert run_ranks(_call_with_a_failing_save, 1, command, world) == [None]
    assert (run / "checkpoints/best").resolve().name == "iter_0000001"
    assert _kept(run) == ["best", "iter_0000001", "iter_0000004"]


def _call_with_a_failing_save(command: list[str], root: Path) -> None:
    publish = CheckpointStore._publish

    def fail(self: CheckpointStore, unfinished: Any, entries: Any) -> None:
        if unfinished.iteration == 3:
            raise OSError(28, "No space left on device")
        publish(self, unfinished, entries)

    with mock.patch.object(CheckpointStore, "_publish", fail):
        _call_with_losses([Call(command)], [2.0, 3.0, 1.0, 2.5], root)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_the_names_are_those_that_a_run_writes(stage: str, world: Path, tmp_path: Path) -> None:
    (answer,) = run_ranks(call_all, 1, [Call(arguments(stage, world, tmp_path / "run"))], world)[0]
    assert answer.code == 0, answer.stderr
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    found = {name.removeprefix("eval/") for name in row if name.startswith("eval/") and "_known_" not in name}
    kinds = {"sft": c.SftConfig, "reward": c.RewardConfig, "dpo": c.DpoConfig, "ppo": c.PpoConfig}
    assert found == set(EVAL_METRICS[kinds[stage]])


def test_what_cannot_be_compared_is_refused(world: Path, tmp_path: Path) -> None:
    run = arguments("sft", world, tmp_path / "run", "checkpoint.keep_best=eval/reward/score_mean")
    (answer,) = run_ranks(call_all, 1, [Call(run)], world)[0]
    assert answer.code == 2
    assert "is no metric of this command's evaluations; take one of eval/sft/loss" in answer.stderr
    for overrides, message in (
        (["checkpoint.keep_best=sft/loss"], "must name a metric under eval/"),
        (["checkpoint.keep_best=eval/sft/loss"], "set data.eval=FILE and log.eval_every above 0"),
    ):
        with pytest.raises(c.ConfigError, match=message):
            load_config(c.SftConfig, None, ["run.dir=x", *overrides])


def test_the_actor_learns_slower_than_the_critic() -> None:
    config = load_config(c.PpoConfig, None, ["run.dir=x", "optimizer.schedule=linear"])
    assert (config.optimizer.lr, config.critic_optimizer.lr) == (1e-6, 1e-5)
    with pytest.raises(c.ConfigError, match=r"unknown key optimizer.lrr; did you mean optimizer.lr\?"):
        load_config(c.PpoConfig, None, ["run.dir=x", "optimizer.lrr=1"])
