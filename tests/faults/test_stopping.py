"""Signals in start-up, a second signal, the time budget, generate and score, and torchrun's own restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.faults.processes import Ranks
from tests.faults.running import Call, Interruption, arguments, call_all, check_equal
from tests.ranks import run_ranks

PACKAGE = Path(__file__).parents[2]


def _start(arguments: list[str], launcher: list[str], root: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(root / "cache"), "PYTHONPATH": str(PACKAGE)
    }  # fmt: skip
    command = [sys.executable, *launcher, "-m", "megatron_gil", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_the_libraries_are_imported(number: signal.Signals, world: Path, tmp_path: Path) -> None:
    process = _start(arguments("sft", world, tmp_path / "run"), [], world)
    while not _catches(process.pid, signal.SIGUSR1):  # the last that is listened to; Python itself catches SIGINT
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert f"stopped by {number.name} in checking the data, with nothing to save" in said
    assert not (tmp_path / "run").exists()


def _catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


class WaitForEver:
    """Rank 1 never comes to the first update."""

    def __call__(self, rank: int) -> None:
        def wait(*_: Any, **__: Any) -> None:
            time.sleep(600)

        if rank == 1:
            mock.patch("megatron_gil.engine.megatron.TrainableModel.update", wait).start()


def test_a_second_signal_ends_a_rank_at_once_even_in_a_collective(world: Path, tmp_path: Path) -> None:
    run = arguments("sft", world, tmp_path / "run", "parallel.timeout_s=300")
    ranks = Ranks(run, world, tmp_path / "log", change=WaitForEver())
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(2)
    process = ranks.processes[0]
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(1)
    assert process.exitcode is None, "it saves first, as soon as it can"
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(5)
    assert process.exitcode == 128 + signal.SIGTERM
    ranks.kill()


def test_the_time_budget_stops_as_a_signal_does(world: Path, tmp_path: Path) -> None:
    run, whole = (arguments("sft", world, tmp_path / name) for name in ("run", "whole"))
    calls = [Call([*run, "run.max_minutes=0.00001"]), Call(run), Call(whole)]
    stopped, resumed, uninterrupted = run_ranks(call_all, 1, calls, world)[0]
    assert (stopped.code, resumed.code, uninterrupted.code) == (75, 0, 0)
    assert "stopped by run.max_minutes" in stopped.stderr
    check_equal(tmp_path / "run", tmp_path / "whole")


def test_generate_and_score_leave_no_part_of_their_output(world: Path, tmp_path: Path) -> None:
    responses, scores = tmp_path / "responses.jsonl", tmp_path / "scores.jsonl"
    sizes = ["batch.micro_size=2", "batch.global_size=5"]  # which no ranks divide, and which does not matter
    generate = ["generate", f"models.policy={world / 'policy'}", f"data.train={world / 'prompts.jsonl'}", *sizes]
    generate += [
        "data.max_prompt_tokens=40",
        "sampling.max_new_tokens=4",
        "sampling.micro_size=5",
        f"output={responses}",
    ]
    score = ["score", f"models.reward_model={world / 'reward_model'}", f"data.train={responses}", *sizes]
    score += ["data.max_prompt_tokens=40", "data.max_tokens=60", f"output={scores}"]
    answers = run_ranks(
        call_all,
        2,
        [
            Call(generate, Interruption("rollout", 3, signal.SIGTERM, rank=1)),
            Call(score),  # there is nothing to score yet
            Call(generate),
            Call(score, Interruption("scoring", 3, signal.SIGUSR1, rank=0)),
        ],
        world,
    )
    assert [[answer.code for answer in rank] for rank in answers] == [[75, 2, 0, 75]] * 2, answers[0]
    assert "stopped by SIGTERM in rollout, with nothing to save" in answers[0][0].stderr
    assert len(responses.read_text().splitlines()) == 24
    assert [path.name for path in tmp_path.iterdir()] == [responses.name]


@pytest.mark.long
def test_torchrun_restarts_and_resumes_by_itself(world: Path, tmp_path: Path) -> None:
    run, whole = (arguments("ppo", world, tmp_path / name, "parallel.timeout_s=24") for name in ("run", "whole"))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2", "--standalone"]
    process = _start(run, launcher, world)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.01)
    os.kill(_worker(process.pid), signal.SIGKILL)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "resuming" in said
    assert [answer[0].code for answer in run_ranks(call_all, 2, [Call(whole)], world)] == [0, 0]
    check_equal(tmp_path / "run", tmp_path / "whole")


def _worker(agent: int) -> int:
    """The first process that torchrun has started."""
    return int(Path(f"/proc/{agent}/task/{agent}/children").read_text().split()[0])
