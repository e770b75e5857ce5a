"""Where a run is: what the watchdog and error messages tell of a rank, and where a stop is taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from megatron_gil.parallel.collectives import begin_max_over_ranks, max_over_ranks
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.parallel.watchdog import Whereabouts
from megatron_gil.training.run.signals import StopRequested, StopSignal


class Progress:
    """The phase this rank is in. All ranks enter the same phases in the same order."""

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop
        self._layout: ParallelLayout | None = None
        self.where = Whereabouts(number=0, phase="start-up", since=time.monotonic())
        self.at_end = ExitStack()
        """What is to be undone however the command ends, a kill apart."""
        self.shape: tuple[int, ...] = ()
        """Of the tokens that the phase works on: rows x padded length."""

    def attend(self, layout: ParallelLayout) -> None:
        """There is a layout now, over which ranks can agree to stop."""
        self._layout = layout

    def enter(self, phase: str, batch: Any = None) -> None:
        """Begin a phase; `batch` (of types.py) is what it works on."""
        self.where = Whereabouts(number=self.where.number + 1, phase=phase, since=time.monotonic())
        self.shape = () if batch is None else tuple(batch.tokens.shape)

    def is_asked_to_stop(self) -> bool:
        """Whether this rank is; the next safe point raises on all."""
        return bool(self._stop.wanted)

    def safe_point(self, phase: str, batch: Any = None) -> None:
        """Begin a phase, or raise StopRequested on every rank if any of them wants to stop. Collective.

        To be called only where all that happened since the last whole iteration can be thrown away.
        """
        assert self._layout is not None, "there are no other ranks yet to agree with"
        self.enter(phase, batch)
        if wanted := max_over_ranks(self._stop.wanted, self._layout):
            raise StopRequested(wanted)

    def meet(self, phase: str, batch: Any, busy: bool) -> Callable[[], bool]:
        """A safe point in the midst of a phase (Meet of engine/protocol.py): nobody waits until the answer is asked
        for, which is whether any rank is busy."""
        assert self._layout is not None, "there are no other ranks yet to agree with"
        self.enter(phase, batch)
        finish = begin_max_over_ranks(2 * self._stop.wanted + busy, self._layout)

        def wait() -> bool:
            wanted, busy = divmod(finish(), 2)
            if wanted:
                raise StopRequested(wanted)
            return bool(busy)

        return wait
