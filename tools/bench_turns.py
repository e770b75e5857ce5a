"""Programs measured in turns: each is a process of its own that does a step when it is its turn, and waits in between.

So none is slowed by another's objects or by what another changes in a library, and all meet the same machine: what is
compared are the steps of one round.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

WARM_UP = 3  # first steps, left out
STEP, MEASURED_STEP = "step", "measured step"
_PROCESSES = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a side."""

    seconds: float
    cpu_seconds: float  # of all threads of the process
    notes: Mapping[str, float]  # what the side tells of it
    num_threads: int


class Turns:
    """A side's end of the agreement."""

    def __init__(self, pipe: Any, num_threads: int) -> None:
        self._pipe, self._start = pipe, _clocks()
        torch.set_num_threads(num_threads)

    def wait(self, notes: Mapping[str, float]) -> bool:
        """Report the step since the last call and return when it is this side's turn; whether the next step is one
        whose memory is asked for, and not its time."""
        seconds, cpu_seconds = (now - start for now, start in zip(_clocks(), self._start, strict=True))
        threads = torch.get_num_threads()
        self._pipe.send(Step(seconds=seconds, cpu_seconds=cpu_seconds, notes=notes, num_threads=threads))
        asked = self._pipe.recv()
        self._start = _clocks()
        return asked == MEASURED_STEP


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


@dataclass(slots=True)
class Side:
    name: str
    work: Callable[..., None]
    """work(turns, *arguments, num_steps): calls turns.wait after each step. It does not reach the last one."""
    arguments: tuple[Any, ...]
    steps: list[Step] = field(default_factory=list)
    measured: Step | None = None
    """The step whose memory was asked for."""

    @property
    def seconds(self) -> list[float]:
        return [step.seconds for step in self.steps]

    @property
    def cpu_seconds(self) -> list[float]:
        return [step.cpu_seconds for step in self.steps]

    def note(self, name: str) -> float | None:
        """Its median; None where the side does not tell of it."""
        found = [step.notes[name] for step in self.steps if name in step.notes]
        return statistics.median(found) if found else None


def take_turns(sides: Sequence[Side], *, rounds: int, num_threads: int, memory: bool = False) -> None:
    """Fill the steps of every side. memory: one more step of each at the end, in `measured`."""
    os.environ |= {"OMP_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that spin would measure whatever else runs on the machine
    num_steps = WARM_UP + rounds + 2  # not reached: the last one may also save
    pipes, processes = zip(*(_start(side, num_steps, num_threads) for side in sides), strict=True)
    try:
        for pipe in pipes:  # the first step comes with the start; once all have started, one at a time
            pipe.recv()
        order = random.Random(1)
        pairs = list(zip(sides, pipes, strict=True))
        for number in range(1, WARM_UP + rounds):
            for side, pipe in order.sample(pairs, len(pairs)):
                pipe.send(STEP)
                step = pipe.recv()
                if number >= WARM_UP:
                    side.steps.append(step)
        for side, pipe in pairs if memory else []:
            pipe.send(MEASURED_STEP)
            side.measured = pipe.recv()
    finally:
        for process in processes:
            process.kill()  # each still waits for a turn that does not come
            process.join()
    for step in (step for side in sides for step in side.steps):
        assert step.num_threads == num_threads, "a side changed the number of threads"


def _start(side: Side, num_steps: int, num_threads: int) -> tuple[Any, Any]:
    mine, its = _PROCESSES.Pipe()
    process = _PROCESSES.Process(
        target=_work, args=(side.work, its, side.arguments, num_steps, num_threads), daemon=True
    )
    process.start()
    its.close()
    return mine, process


def _work(work: Callable[..., None], pipe: Any, arguments: tuple[Any, ...], num_steps: int, num_threads: int) -> None:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        work(Turns(pipe, num_threads), *arguments, num_steps)


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of the pairs of one round."""
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (least to most)."""
    middle, *ends = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({' to '.join(ends)})"
