"""Stopping politely: a signal or the time budget asks, the loop saves at the next safe point and exits with 75.

Imports nothing heavy, so that the command line can listen before the slow libraries are loaded.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time

EXIT_STOPPED = 75
"""The run was stopped after saving; the caller should start it again."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
OUT_OF_TIME = 255
"""What `StopSignal.wanted` says when run.max_minutes are over; else it is the number of a signal."""


class StopRequested(Exception):
    """Raised at a safe point, where nothing has changed since the last whole iteration."""

    def __init__(self, wanted: int) -> None:
        self.reason = "run.max_minutes" if wanted == OUT_OF_TIME else signal.Signals(wanted).name
        super().__init__(f"stopped by {self.reason}")


class StopSignal:
    """Remembers that a signal came. A second one ends the process at once, but for SIGHUP, which a shell, the kernel
    and torchrun may each send when a connection is lost. A SIGHUP ignored from the start, as under nohup, stays so.

    Made as early as the command starts, so that no phase of the run is without it. A thread listens, because Python's
    own handlers wait while the main thread is inside a collective. Processes forked later ignore the signals.
    """

    def __init__(self) -> None:
        self._started, self._max_minutes = time.monotonic(), None
        self._signal = 0
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, lambda *_: None)  # the pipe is written only where there is a handler
        # Python puts the system's handlers back as it ends: a signal that comes then would kill a run that has saved.
        atexit.register(_ignore_signals)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()

    def limit(self, max_minutes: float | None) -> None:
        """Also stop this many minutes after this object was made; None never."""
        self._max_minutes = max_minutes

    @property
    def wanted(self) -> int:
        """Why this rank wants to stop: a signal's number or OUT_OF_TIME; 0 if it does not."""
        late = self._max_minutes is not None and time.monotonic() - self._started > 60 * self._max_minutes
        return self._signal or (OUT_OF_TIME if late else 0)

    def _listen(self, reader: int) -> None:
        while number := os.read(reader, 1)[0]:
            if number in SIGNALS:
                if self._signal and number != signal.SIGHUP:
                    os._exit(128 + number)
                self._signal = self._signal or number


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
