"""JSON Lines files that a run appends to, and that survive its crashes and a full disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


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
    """Drop rows of iterations that will be run again and a last line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # only the line being written when the process died can be incomplete
        if row["iteration"] < iteration:
            kept.append(line + "\n")
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(kept), encoding="utf-8")
    beside.replace(path)
