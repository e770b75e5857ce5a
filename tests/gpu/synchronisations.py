"""Host synchronisations on a real GPU, counted by the line that made them, and compared with another count."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

PACKAGES = ("megatron_gil/", "megatron/core/")
WARNING = "called a synchronizing CUDA operation"  # c10/cuda/CUDAFunctions.cpp


@contextmanager
def count_synchronisations() -> Iterator[Counter[str]]:
    """Counts by line (`megatron_gil/engine/generation.py:87`) while it is open, of what torch itself warns of: copies
    between host and device, reading a number, sizes that depend on values. Not torch.cuda.synchronize, nor NCCL."""
    counts: Counter[str] = Counter()
    with record_lines(WARNING, counts):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def count_pretended(report: Any) -> Iterator[Counter[str]]:
    """The same of a pretended device, from its report (tests/pretend)."""
    counts: Counter[str] = Counter()
    before = report.syncs.copy()
    yield counts
    for sync, count in (report.syncs - before).items():
        counts[sync.line.number.split(" > ")[0]] += count


@contextmanager
def record_lines(text: str, counts: Counter[str]) -> Iterator[None]:
    """Counts the warnings that say `text` by the line of this project that they come from; others are shown."""
    show = warnings.showwarning

    def count(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if text in str(message):
            counts[_line()] += 1
        else:
            show(message, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=text)
        warnings.showwarning = count  # type: ignore[assignment]  catch_warnings puts the old one back
        yield


def _line() -> str:
    """The innermost line of the package; of megatron-core where none is below it on the stack."""
    frame, found = sys._getframe(1), "elsewhere"
    while frame is not None:
        name = frame.f_code.co_filename
        for package in PACKAGES:
            if f"/{package}" in name:
                line = f"{name[name.rfind(package) :]}:{frame.f_lineno}"
                if package == PACKAGES[0]:
                    return line
                found = line if found == "elsewhere" else found
        frame = frame.f_back  # type: ignore[assignment]
    return found


def compare_counts(real: Mapping[str, int], pretended: Mapping[str, int]) -> list[str]:
    """One line for each place where the two counts differ; none where they agree."""
    places = sorted(real.keys() | pretended.keys())
    apart = [place for place in places if real.get(place, 0) != pretended.get(place, 0)]
    return [f"{place}: {real.get(place, 0)} on the GPU, {pretended.get(place, 0)} pretended" for place in apart]
