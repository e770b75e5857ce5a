"""Commands as stages: each a process of its own, a few at a time; one that has left its product is never run again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


class StageFailed(RuntimeError):
    """A command ended badly; one line names its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One command. It has finished when `product` exists."""

    name: str
    command: Sequence[str]
    """What follows `python`."""
    product: Path
    run_dir: Path | None = None  # of a training command
    num_iterations: int = 1


class Runner:
    """Runs stages as processes, `workers` at a time, each with one thread."""

    def __init__(self, logs: Path, *, workers: int, show: Callable[[Stage, int], None]) -> None:
        """logs: directory of a file per stage. show: called with a stage's iterations so far, from several threads."""
        self._logs, self._workers, self._show = logs, workers, show
        self._running: set[subprocess.Popen[bytes]] = set()
        logs.mkdir(parents=True, exist_ok=True)

    def run_all(self, stages: Sequence[Stage], *, keep_going: bool = False) -> list[StageFailed]:
        """Stages that do not need one another. The first that fails ends the others, unless `keep_going`: then all
        are tried and the failures returned."""
        failures: list[StageFailed] = []
        with ThreadPoolExecutor(self._workers) as pool:
            futures = [pool.submit(self._run, stage) for stage in stages]
            try:
                for future in futures:
                    try:
                        future.result()
                    except StageFailed as failure:
                        if not keep_going:
                            raise
                        failures.append(failure)
            except BaseException:  # also a signal: no process may be left behind
                for future in futures:
                    future.cancel()
                for process in list(self._running):
                    process.terminate()  # it saves and ends
                raise
        return failures

    def _run(self, stage: Stage) -> None:
        self._show(stage, 0)
        if not stage.product.exists():
            log = self._logs / f"{stage.name.replace(' ', '_')}.log"
            with log.open("ab") as file:
                process = subprocess.Popen(
                    [sys.executable, *stage.command],
                    stdout=file,
                    stderr=file,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # the terminal's Ctrl-C reaches the caller, which hands it on once
                    env={**os.environ, "OMP_NUM_THREADS": "1"},  # as many processes as cores
                )
            self._running.add(process)
            while process.poll() is None:
                self._show(stage, _count_lines(stage.run_dir))
                time.sleep(0.2)
            self._running.discard(process)
            if process.returncode != 0 or not stage.product.exists():
                raise StageFailed(f"{stage.name} ended with exit code {process.returncode}; its output is in {log}")
        self._show(stage, stage.num_iterations)


def _count_lines(run_dir: Path | None) -> int:
    """Iterations that a run has logged."""
    try:
        return 0 if run_dir is None else (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
