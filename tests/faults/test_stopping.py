"""Signals in start-up, a second signal, the time budget, and torchrun's own restart."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_gil.engine.checkpoint import CheckpointStore
from megatron_gil.engine.decoder import Decoder
from tests.faults.processes import Change, Ranks, SignalAt
from tests.faults.running import Call, arguments, call_all, check_equal
from tests.ranks import PATIENCE_S, run_ranks

PACKAGE = Path(__file__).parents[2]


def _start(arguments: list[str], launcher: list[str], root: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(root / "cache"), "PYTHONPATH": str(PACKAGE)
    }  # fmt: skip
    command = [sys.executable, *launcher, "-m", "megatron_gil", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_while_the_libraries_are_imported(number: signal.Signals, world: Path, tmp_path: Path) -> None:
    process = _start(arguments("sft", world, tmp_path / "run"), [], world)
    while not _catches(process.pid, signal.SIGUSR1):  # the last that is listened to; Python itself catches SIGINT
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75, said
    assert f"stopped by {number.name} in checking the data, with nothing to save" in said
    assert not (tmp_path / "run").exists()


HANG_UP = """
import os, signal, sys, time
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from megatron_gil.training.run.signals import StopSignal
stop = StopSignal()
for _ in range(2):  # from the shell and from the kernel
    os.kill(os.getpid(), signal.SIGHUP)
os.kill(os.getpid(), signal.SIGUSR1) if sys.argv[1] == "nohup" else None
while not stop.wanted:
    time.sleep(0.01)
print(signal.Signals(stop.wanted).name)
"""


@pytest.mark.parametrize(("how", "wanted"), [("ssh", "SIGHUP"), ("nohup", "SIGUSR1")])
def test_a_lost_connection_stops_a_run_unless_it_was_started_under_nohup(how: str, wanted: str) -> None:
    done = subprocess.run([sys.executable, "-c", HANG_UP, how], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.stdout, done.stderr) == (f"{wanted}\n", "")


class WatchDecoders:
    """Writes at each checkpoint whether a decoder, with its cache, is still in memory."""

    def __call__(self, rank: int) -> None:
        gc.disable()
        decoders: list[weakref.ref[Decoder]] = []

        def make(*args: Any, **kwargs: Any) -> Decoder:
            decoder = Decoder(*args, **kwargs)
            decoders.append(weakref.ref(decoder))
            return decoder

        begin = CheckpointStore.begin

        def begin_and_tell(*args: Any, **kwargs: Any) -> None:
            print(
                f"{len(decoders)} decoders made, in memory: {[ref() is not None for ref in decoders]}", file=sys.stderr
            )
            begin(*args, **kwargs)

        mock.patch("megatron_gil.engine.generation.Decoder", make).start()
        mock.patch.object(CheckpointStore, "begin", begin_and_tell).start()


@dataclass(frozen=True)
class Both:
    first: Change
    second: Change

    def __call__(self, rank: int) -> None:
        self.first(rank)
        self.second(rank)


def test_a_stop_in_a_rollout_frees_its_cache_before_it_saves(world: Path, tmp_path: Path) -> None:
    """On a GPU the optimizers' states, which models.offload let wait on the host, need that room to be saved."""
    stop = SignalAt("engine.slots.choose_tokens", 3, (0,), signal.SIGTERM)
    run = arguments("ppo", world, tmp_path / "run", "models.offload=all", "sampling.min_new_tokens=6")
    ranks = Ranks(run, world, tmp_path / "log", world_size=1, change=Both(WatchDecoders(), stop))
    assert ranks.wait() == [75], ranks.said(0)
    assert "stopped by SIGTERM in rollout" in ranks.said(0)
    assert "1 decoders made, in memory: [False]" in ranks.said(0)


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
    process.join(150)  # half of the collective's time-out
    assert process.exitcode == 128 + signal.SIGTERM
    ranks.kill()


def test_the_time_budget_stops_as_a_signal_does(world: Path, tmp_path: Path) -> None:
    run, whole = (arguments("sft", world, tmp_path / name) for name in ("run", "whole"))
    calls = [Call([*run, "run.max_minutes=0.00001"]), Call(run), Call(whole)]
    stopped, resumed, uninterrupted = run_ranks(call_all, 1, calls, world)[0]
    assert (stopped.code, resumed.code, uninterrupted.code) == (75, 0, 0)
    assert "stopped by run.max_minutes" in stopped.stderr
    check_equal(tmp_path / "run", tmp_path / "whole")


@pytest.mark.long
def test_torchrun_restarts_and_resumes_by_itself(world: Path, tmp_path: Path) -> None:
    run, whole = (arguments("ppo", world, tmp_path / name, "parallel.timeout_s=120") for name in ("run", "whole"))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2", "--standalone"]
    process = _start(run, launcher, world)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.01)
    os.kill(_worker(process.pid), signal.SIGKILL)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    assert "resuming" in said
    assert [answer[0].code for answer in run_ranks(call_all, 2, [Call(whole)], world)] == [0, 0]
    check_equal(tmp_path / "run", tmp_path / "whole")


def _worker(agent: int) -> int:
    """The first process that torchrun has started."""
    return int(Path(f"/proc/{agent}/task/{agent}/children").read_text().split()[0])


def test_a_signal_while_the_process_ends_does_not_kill_it() -> None:
    """It would be taken for the run's own fault: Python puts the system's handlers back before the process is gone."""
    program = """
import ctypes, signal, sys
from megatron_gil.training.run.signals import StopSignal

StopSignal()
libc = ctypes.CDLL(None)
libc.on_exit(getattr(libc, "raise"), None)  # the last thing to happen: raise(exit code)
sys.exit(int(signal.SIGUSR1))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=PATIENCE_S).returncode == signal.SIGUSR1
