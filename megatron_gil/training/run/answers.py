"""Answers as they come: in OUTPUT.part until all are there, so that no stop loses them, and then in OUTPUT.

OUTPUT.part begins with a line that says what it was begun with; each line after it holds the rows of one batch over
all ranks. A batch is there whole or not at all, so that what is left is answered in the same batches as without a stop.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_gil.config import CommandConfig, ConfigError
from megatron_gil.config.files import flatten
from megatron_gil.data.hub import HubName
from megatron_gil.data.rows.records import matching
from megatron_gil.engine.files import reason
from megatron_gil.parallel.collectives import agree, broadcast_object, gather_objects
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.paths import write_whole
from megatron_gil.training.run.loop import RunFailed
from megatron_gil.training.run.metrics import clock_text
from megatron_gil.training.run.row_file import RowFile

Row = dict[str, Any]
BEGUN_WITH, ROWS = "begun_with", "rows"
LINE_EVERY_S = 30.0
"""Seconds between two lines of progress in a log."""
FREE = ("output", "run.max_minutes", "sampling.micro_size", "reward.timeout_s", "reward.threads")
"""Settings that may change between two starts, besides those of parallel and batch: no answer depends on them."""


class AnswerFile:
    """The rows of one `output`, kept by rank 0. All methods but `add` are collective."""

    def __init__(self, output: Path, layout: ParallelLayout, *, begun_with: Mapping[str, str], num_rows: int) -> None:
        """begun_with: what the rows depend on. ConfigError where OUTPUT.part was begun with something else, or is
        no such file. The lock of `output` keeps other processes away (checks.py: take_output)."""
        self.output, self.part = output, output.with_name(f"{output.name}.part")
        self._layout, self._num_rows = layout, num_rows
        self._waiting: dict[int, Row] = {}
        found = agree(layout, lambda: self._open(dict(begun_with)) if layout.is_main else [])
        self.done: frozenset[int] = frozenset(broadcast_object(found, layout))
        """Rows that an earlier start has answered."""
        self._num_done = len(self.done)
        if layout.is_main:
            self._show = _RowProgress(output.name, num_rows, self._num_done)
            if self.done:
                text = f"{self.part}: {len(self.done)} of {num_rows} rows are there, going on with the rest"
                print(text, file=sys.stderr)

    def add(self, rows: Mapping[int, Row]) -> None:
        """Rows of this rank, by their number; `flush` writes them."""
        self._waiting |= rows

    def flush(self) -> None:
        """Write what all ranks have added. RunFailed where that cannot be done."""
        layout, error = self._layout, ""
        mine, self._waiting = self._waiting if layout.speaks_for_copy else {}, {}
        parts = gather_objects(mine, layout)
        if layout.is_main:
            rows = {str(number): row for part in parts for number, row in part.items()}
            if rows:
                self._file.add([{ROWS: rows}])
                error = self._file.write()
                self._num_done += len(rows)
                self._show.update(self._num_done)
        if error := broadcast_object(error, layout):
            raise RunFailed(f"{error}; the rows before are kept in {self.part}. Make room, then start again")

    def finish(self) -> None:
        """Write `output`, in the order of the rows, and remove OUTPUT.part."""
        self.flush()
        error = ""
        if self._layout.is_main:
            self._show.close()
            _, rows, _ = _read_part(self.part)
            text = "".join(json.dumps(rows[number], ensure_ascii=False) + "\n" for number in sorted(rows))
            try:
                write_whole(self.output, text)
                self.part.unlink()
                print(", ".join([f"{len(rows)} rows in {self.output}", *self._show.pace()]), file=sys.stderr)
            except OSError as refused:
                error = f"{self.output} cannot be written: {reason(refused)}; the rows are kept in {self.part}"
        if error := broadcast_object(error, self._layout):
            raise RunFailed(error)

    def stop(self, stopped: object, phase: str) -> None:
        """Say on rank 0 what is kept."""
        if self._layout.is_main:
            self._show.close()
            self._file.write(sync=True)
            kept = f"{self._num_done} of {self._num_rows} rows are kept in {self.part}"
            print(f"{stopped} in {phase}; {kept}, start again to go on", file=sys.stderr)

    def _open(self, begun_with: dict[str, str]) -> list[int]:
        """The rows that are there; the file is cut after the last whole batch."""
        try:
            self.part.touch()
            header, rows, end = _read_part(self.part)
            if header is not None:
                self._compare(header, begun_with)
            os.truncate(self.part, end)
            self._file = RowFile(self.part)
            if header is None:
                self._file.add([{BEGUN_WITH: begun_with}])
                if error := self._file.write():
                    raise ConfigError(f"output={self.output}: {error}")
        except OSError as refused:
            raise ConfigError(f"output={self.output}: {self.part} cannot be written: {reason(refused)}") from None
        return list(rows)

    def _compare(self, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        fix = f"start with what it was begun with, or delete {self.part} to begin anew"
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                changed = "have changed" if key.startswith("the files of") else ""
                changed = changed or f"was {before.get(key, 'not set')} and is {now.get(key, 'not set')}"
                raise ConfigError(f"output={self.output} was begun with other settings: {key} {changed}; {fix}")


class _RowProgress:
    """A bar on a terminal, in a log a line now and then."""

    def __init__(self, name: str, num_rows: int, num_done: int) -> None:
        self._num_rows, self._start, self._done = num_rows, num_done, num_done
        self._started = self._said = time.monotonic()
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("rows {task.fields[pace]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=num_rows, completed=num_done, pace="")
        self._bar.start()

    def update(self, num_done: int) -> None:
        self._done, now = num_done, time.monotonic()
        self._bar.update(self._task, completed=num_done, pace="".join(self.pace()))
        if not self._console.is_terminal and now - self._said >= LINE_EVERY_S:
            self._said = now
            left = (now - self._started) / (num_done - self._start) * (self._num_rows - num_done)
            done = f"{num_done:>{len(str(self._num_rows))}}/{self._num_rows} rows"
            self._console.print("  ".join([done, *self.pace(), f"left {clock_text(left)}"]), markup=False)

    def pace(self) -> list[str]:
        """Rows a second of this start; empty where it has answered none."""
        count = self._done - self._start
        return [f"{count / (time.monotonic() - self._started):.3g} rows/s"] if count else []

    def close(self) -> None:
        self._bar.stop()


def what_rows_depend_on(config: CommandConfig, *paths: str) -> dict[str, str]:
    """Every setting that an answer depends on, and the state of the files under the paths that these keys name."""
    flat = flatten(asdict(config))
    kept = {
        key: value for key, value in flat.items() if key not in FREE and not key.startswith(("parallel.", "batch."))
    }
    files = {key: flat[key] for key in paths if flat[key] and HubName.parse(flat[key]) is None}  # a commit is a stamp
    stamps = {f"the files of {key}": file_stamps(Path(path)) for key, path in files.items()}
    return {key: str(value) for key, value in (kept | stamps).items()}


def file_stamps(path: Path) -> str:
    """Names, sizes and times of change of a file, or of the files in a directory or of a pattern."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else matching(path)
    return str([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def _read_part(path: Path) -> tuple[dict[str, str] | None, dict[int, Row], int]:
    """(what it was begun with, its rows, the bytes that are whole); (None, {}, 0) for one that has hardly begun."""
    header, rows, end = None, dict[int, Row](), 0
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last \n was being written
        try:
            content = json.loads(line)
            if header is None:
                header = dict(content[BEGUN_WITH])
            else:
                rows |= {int(number): row for number, row in content[ROWS].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            if header is None:
                raise ConfigError(f"{path} is not a part of an earlier generate or score; move it away") from None
            break
        end += len(line) + 1
    return header, rows, end
