"""What is counted: kernel launches and host synchronisations, with the line that made them."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

_ROOT = Path(__file__).parents[2]
_OURS = str(_ROOT / "megatron_gil") + os.sep
_HERE = str(Path(__file__).parent) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_CORE = os.sep + os.path.join("megatron", "core") + os.sep


class Line(NamedTuple):
    """Of megatron_gil; and of megatron.core, where that is further in. Of the innermost caller of torch elsewhere."""

    function: str
    """As `megatron_gil/engine/optimizer.py:ModelOptimizer.step > megatron/core/utils.py:some_function`."""
    number: str
    """The same with line numbers, as an editor opens them."""


class Sync(NamedTuple):
    """A line at which the host waits for the device."""

    kind: str
    line: Line

    def __str__(self) -> str:
        return f"{self.line.number} ({self.kind}, in {self.line.function.rpartition(':')[2]})"


class Report:
    """Counts so far. A launch is an ATen operation with a result on a GPU: about one kernel."""

    def __init__(self) -> None:
        self.launches: Counter[tuple[str, Line]] = Counter()
        self.syncs: Counter[Sync] = Counter()

    @property
    def num_launches(self) -> int:
        return self.launches.total()

    @property
    def num_syncs(self) -> int:
        return self.syncs.total()

    def launch(self, operation: str) -> None:
        self.launches[operation, find_line()] += 1

    def sync(self, kind: str, count: int = 1) -> None:
        if count:
            self.syncs[Sync(kind, find_line())] += count

    def as_dict(self) -> dict[str, Any]:
        operations, lines = Counter[str](), Counter[str]()
        for (operation, line), count in self.launches.items():
            operations[operation] += count
            lines[line.number] += count
        return {
            "launches": self.num_launches,
            "syncs": self.num_syncs,
            "syncs_by_line": {str(sync): count for sync, count in self.syncs.most_common()},
            "launches_by_line": dict(lines.most_common()),
            "launches_by_operation": dict(operations.most_common()),
        }


def find_line() -> Line:
    """The line of our code that Python is in."""
    core: FrameType | None = None
    caller: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        kind = _kind(frame.f_code.co_filename)
        if kind == "ours":
            here = _line(frame.f_code, frame.f_lineno)
            return here if core is None else _joined(here, _line(core.f_code, core.f_lineno))
        if kind == "core" and core is None:
            core = frame
        if kind in ("core", "other") and caller is None:
            caller = frame
        frame = frame.f_back
    return Line("nowhere", "nowhere") if caller is None else _line(caller.f_code, caller.f_lineno)


@cache
def _kind(file_name: str) -> str:
    if file_name.startswith(_OURS):
        return "ours"
    if _CORE in file_name:
        return "core"
    name = file_name.removeprefix(_HERE)
    is_tool = name != file_name and not name.startswith("test_")
    return "torch" if is_tool or file_name.startswith((_TORCH, "<")) else "other"


@cache
def _line(code: CodeType, number: int) -> Line:
    file, function = _place(code)
    return Line(f"{file}:{function}", f"{file}:{number}")


@cache
def _joined(ours: Line, core: Line) -> Line:
    return Line(*(" > ".join(both) for both in zip(ours, core, strict=True)))


@cache
def _place(code: CodeType) -> tuple[str, str]:
    name = code.co_filename
    name = name[name.rfind(_CORE) + 1 :] if _CORE in name else name.removeprefix(str(_ROOT) + os.sep)
    # Before Python 3.12 a list comprehension is a function of its own.
    return name, re.sub(r"(\.<locals>\.<\w+>)+$", "", code.co_qualname)
