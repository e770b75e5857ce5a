"""Stopping politely: a signal or the time budget asks, the loop saves at the next safe point and exits with 75."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from megatron_gil.parallel.collectives import any_rank
from megatron_gil.parallel.layout import ParallelLayout

EXIT_STOPPED = 75
"""The run was stopped after saving; the caller should start it again."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequested(Exception):
    """Raised at a safe point, where nothing has changed since the last whole iteration."""


class StopSignal:
    """Remembers that a signal came. A second one ends the process at once.

    Made as early as the command starts, so that no phase of the run is without it. Processes forked later ignore it.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._pid, self._reason = os.getpid(), ""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        if self._reason:
            os._exit(128 + number)
        self._reason = signal.Signals(number).name

    @property
    def reason(self) -> str:
        """Why this rank wants to stop; empty if it does not."""
        if not self._reason and self._deadline is not None and time.monotonic() > self._deadline:
            self._reason = "run.max_minutes"
        return self._reason

    def on_any_rank(self, layout: ParallelLayout) -> bool:
        """Whether any rank wants to stop; every rank gets the same answer (a collective)."""
        return any_rank(bool(self.reason), layout)

    def safe_point(self, layout: ParallelLayout) -> None:
        """Raise StopRequested on every rank if any of them wants to stop."""
        if self.on_any_rank(layout):
            raise StopRequested
