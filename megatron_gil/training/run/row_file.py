"""JSON Lines files that a run appends to, and that survive its crashes and a full disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_gil.config import ConfigError
from megatron_gil.jsonl import iter_lines


class RowFile:
    """Rows that cannot be written wait for the next attempt, so that none is lost or cut in two."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting = path, b""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._end = os.fstat(self._file).st_size

    def add(self, rows: list[dict[str, Any]]) -> None:
        self._waiting += "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()

    def write(self, *, sync: bool = False) -> str:
        """Write all that waits (sync: down to the disk); why that failed, or empty."""
        try:
            while self._waiting:
                count = os.pwrite(self._file, self._waiting, self._end)
                self._end, self._waiting = self._end + count, self._waiting[count:]
            if sync:
                os.fsync(self._file)
            if os.fstat(self._file).st_nlink == 0:
                return f"{self._path}: deleted while the run writes it"
        except OSError as error:
            return f"{self._path}: {error.strerror}"
        return ""


def keep_iterations_below(path: Path, iteration: int) -> None:
    """Drop rows of iterations that will be run again and a last line that a crash cut short; ConfigError for a damaged
    one."""
    if not path.exists():
        return
    kept = []
    for line in iter_lines(path, growing=True):  # only the line being written when the process died can be incomplete
        if not isinstance(line.value, dict) or not isinstance(line.value.get("iteration"), int):
            raise ConfigError(f"{path}:{line.number}: a row of a run has an iteration; remove the line or the file")
        if line.value["iteration"] < iteration:
            kept.append(line.content.rstrip(b"\n") + b"\n")
    beside = path.with_suffix(".tmp")
    beside.write_bytes(b"".join(kept))
    beside.replace(path)
