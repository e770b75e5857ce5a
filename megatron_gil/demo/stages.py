"""Commands as stages, a few at a time; one that has left its product is never run again.

A process runs one stage after the other: what a command imports takes longer than most stages work.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from megatron_gil.training.run.signals import StopSignal

SHOWN_EVERY_S = 0.2


class StageFailed(RuntimeError):
    """A command ended badly; one line names its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One command. It has finished when `product` exists."""

    name: str
    arguments: Sequence[str]
    """Of the function that the worker serves."""
    product: Path
    needs: Sequence[str] = ()  # names of stages that must have finished
    run_dir: Path | None = None  # of a training command
    num_iterations: int = 1


def serve(main: Callable[[list[str], StopSignal], int]) -> int:
    """What a worker does: `main` for each line of standard input, {"arguments": [...], "log": FILE}; the exit code.

    Standard output gets an empty line for each that gave 0; another code ends the process with it. A signal that comes
    between two commands stops the next.
    """
    stop = StopSignal()
    commands, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    _open_as(os.devnull, 0)
    for line in commands:
        command = json.loads(line)
        _open_as(command["log"], 1, 2)
        if code := main(command["arguments"], stop):
            return code
        print(file=answers, flush=True)
    return 0


def _open_as(path: str, *descriptors: int) -> None:
    opened = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    for descriptor in descriptors:
        os.dup2(opened, descriptor)
    os.close(opened)


class Runner:
    """Runs stages in `workers` processes, each with one thread."""

    def __init__(self, logs: Path, *, worker: Sequence[str], workers: int, show: Callable[[Stage, int], None]) -> None:
        """logs: directory of a file per stage. worker: what follows `python`, to start a process that calls `serve`.
        show: called with a stage's iterations so far, from several threads."""
        self._logs, self._worker, self._workers, self._show = logs, worker, workers, show
        self._running: set[subprocess.Popen[str]] = set()
        logs.mkdir(parents=True, exist_ok=True)

    def run_all(self, stages: Sequence[Stage], *, keep_going: bool = False) -> list[StageFailed]:
        """Stages in the order given, as far as they need one another. The first that fails ends the others, unless
        `keep_going`: then all are tried and the failures returned."""
        left = [stage for stage in stages if not stage.product.exists()]
        for stage in stages:
            if stage not in left:
                self._show(stage, 0)
                self._show(stage, stage.num_iterations)
        queue, failures = _Queue(left), list[StageFailed]()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                futures = [pool.submit(self._work, queue, failures, keep_going) for _ in left[: self._workers]]
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:  # also a signal: no process may be left behind
                queue.close()
                for process in list(self._running):
                    process.terminate()  # it saves and ends
                raise
        return failures

    def _work(self, queue: _Queue, failures: list[StageFailed], keep_going: bool) -> None:
        """Run stages of the queue in one process, until none is left."""
        process = None
        while (stage := queue.take()) is not None:
            log = self._logs / f"{stage.name.replace(' ', '_')}.log"
            process = process or self._start(log)
            if queue.is_closed:
                process.terminate()  # it was not among those that were told
            try:
                self._run(stage, process, log)
            except StageFailed as failure:
                if not keep_going:
                    queue.close()
                    raise
                failures.append(failure)
                process = None
            queue.finish(stage)
        if process is not None:
            self._end(process)

    def _start(self, log: Path) -> subprocess.Popen[str]:
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *self._worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,  # the terminal's Ctrl-C reaches the caller, which hands it on once
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # as many processes as cores
            )
        self._running.add(process)
        return process

    def _end(self, process: subprocess.Popen[str]) -> int:
        """Its exit code, once it has nothing more to do."""
        process.communicate()
        self._running.discard(process)
        return process.returncode

    def _run(self, stage: Stage, process: subprocess.Popen[str], log: Path) -> None:
        """StageFailed: the process has ended."""
        self._show(stage, 0)
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed, and does not answer
            print(json.dumps({"arguments": stage.arguments, "log": str(log)}), file=process.stdin, flush=True)
        while not select.select([process.stdout], [], [], SHOWN_EVERY_S)[0]:
            self._show(stage, _count_lines(stage.run_dir))
        if not process.stdout.readline() or not stage.product.exists():
            raise StageFailed(f"{stage.name} ended with exit code {self._end(process)}; its output is in {log}")
        self._show(stage, stage.num_iterations)


class _Queue:
    """Stages that wait for a process."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._waiting, self._unfinished = list(stages), {stage.name for stage in stages}
        self._changed = threading.Condition()
        self.is_closed = False

    def take(self) -> Stage | None:
        """The first stage that needs no other any more, as soon as there is one; None if none is left."""
        with self._changed:
            while self._waiting:
                for stage in self._waiting:
                    if self._unfinished.isdisjoint(stage.needs):
                        self._waiting.remove(stage)
                        return stage
                self._changed.wait()
            return None

    def finish(self, stage: Stage) -> None:
        with self._changed:
            self._unfinished.remove(stage.name)
            self._changed.notify_all()

    def close(self) -> None:
        """Hand out no more."""
        with self._changed:
            self.is_closed = True
            self._waiting.clear()
            self._changed.notify_all()


def _count_lines(run_dir: Path | None) -> int:
    """Iterations that a run has logged."""
    try:
        return 0 if run_dir is None else (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
