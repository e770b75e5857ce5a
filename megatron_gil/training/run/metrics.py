"""Numbers of a run: means over all ranks, and where they are written (metrics.jsonl, the boards, the console)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from megatron_gil.config import TrainConfig
from megatron_gil.training.run.boards import Board, BoardError, WandbRun, open_boards
from megatron_gil.training.run.row_file import RowFile, keep_iterations_below
from megatron_gil.types import AllSum, Metrics

WIDTH = 80
"""Columns of a line on the console."""
LABELS = {
    "reward/score_mean": "score",
    "policy/kl_sequence": "KL",
    "group/return_variance": "variance",
    "time/iteration_s": "s",
    "time/tokens_per_s": "tokens/s",
}
"""Short names of metrics on the console; the others go by the last part of theirs."""


class Means:
    """Weighted means over all data-parallel ranks, in one all-reduce. The names must be the same on every rank."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        """Take in sum(values * weights) / sum(weights); weights default to 1."""
        weights = torch.ones_like(values, dtype=torch.float64) if weights is None else weights.double()
        self._sums[name] = ((values.double() * weights).sum(), weights.sum())

    @staticmethod
    def total(parts: list[Means]) -> Means:
        """The means over several batches, which have the same names."""
        whole = Means()
        for name in parts[0]._sums:
            sums, weights = zip(*(part._sums[name] for part in parts), strict=True)
            whole._sums[name] = (torch.stack(sums).sum(), torch.stack(weights).sum())
        return whole

    def reduce(self, all_sum: AllSum) -> dict[str, float]:
        """name -> mean; a name whose weights sum to 0 is left out."""
        if not self._sums:
            return {}
        pairs = all_sum(torch.stack([torch.stack(pair) for pair in self._sums.values()])).tolist()
        return {name: total / weight for name, (total, weight) in zip(self._sums, pairs, strict=True) if weight != 0}


class RunLog:
    """Writes one object an iteration. Only rank 0 has a directory; elsewhere everything is silent."""

    def __init__(
        self, directory: Path | None, *, config: TrainConfig, num_iterations: int, start: int, line: tuple[str, ...]
    ) -> None:
        """start: the first iteration to come; later ones in the files, of a run that crashed, are dropped.

        line: the metrics of the console line. Raises OSError, ConfigError for a damaged file and BoardError.
        """
        self._directory, self._num_iterations, self._line = directory, num_iterations, line
        self._started, self._start = time.monotonic(), start
        if directory is None:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            keep_iterations_below(directory / name, start)
        self._metrics, self._samples = RowFile(directory / "metrics.jsonl"), RowFile(directory / "samples.jsonl")
        self._boards = open_boards(directory, config, start)
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(directory.name, total=num_iterations, completed=start)
        self._bar.start()
        for board in self._boards:
            if isinstance(board, WandbRun):
                self.note(f"{board.name}: {board.place}")

    def note(self, text: str) -> None:
        """One line for the person who watches."""
        if self._directory is not None:
            self._console.print(text, markup=False)

    def samples(self, iteration: int, samples: list[dict[str, Any]]) -> None:
        """Rows of iteration number `iteration` for a person to read."""
        if self._directory is not None:
            self._samples.add([{"iteration": iteration, **sample} for sample in samples])
            self._on_boards(lambda board: board.samples(iteration, samples))

    def iteration(self, iteration: int, metrics: Metrics) -> None:
        """Write iteration number `iteration` (from 0)."""
        if self._directory is None:
            return
        self._metrics.add([{"iteration": iteration, **{k: _plain(v) for k, v in metrics.items()}}])
        for file in (self._metrics, self._samples):
            if trouble := file.write():
                self.note(f"{trouble}; its rows wait in memory")
        self._on_boards(lambda board: board.iteration(iteration, metrics))
        self._bar.update(self._task, completed=iteration + 1)
        self._console.print(self._console_line(iteration, metrics), markup=False)

    def sync(self) -> str:
        """Put every row on disk; why that fails, or empty."""
        return "" if self._directory is None else self._metrics.write(sync=True) or self._samples.write(sync=True)

    def _on_boards(self, show: Callable[[Board], None]) -> None:
        """On each that still works."""
        for board in list(self._boards):
            try:
                show(board)
            except BoardError as error:
                self._boards.remove(board)
                self.note(f"no more {board.name} in this run, which goes on: {error}; metrics.jsonl has everything")

    def _console_line(self, iteration: int, metrics: Metrics) -> str:
        """At most 80 columns: what is left over is in metrics.jsonl."""
        done = iteration + 1 - self._start
        left = (time.monotonic() - self._started) / done * (self._num_iterations - iteration - 1)
        width = len(str(self._num_iterations))
        line, end = f"{iteration + 1:>{width}}/{self._num_iterations}", f"  left {clock_text(left)}"
        for name in self._line:
            part = f"  {LABELS.get(name, name.rpartition('/')[2])} {short(metrics[name])}" if name in metrics else ""
            if len(line) + len(part) + len(end) <= WIDTH:
                line += part
        return line + end

    def close(self, code: int) -> None:
        """code: the exit code of the run."""
        if self._directory is not None:
            self._bar.stop()
            self._on_boards(lambda board: board.close(code))


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def short(value: float) -> str:
    """Two or three digits, in thousands (k) or millions (M) where it is large."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e9:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.2g}"


def clock_text(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
