"""How long the phases of an iteration take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timer:
    """Seconds on this process's clock, by phase. A GPU that still works on a phase is counted in the next that waits
    for it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - started

    def metrics(self, *, num_tokens: float) -> dict[str, float]:
        """time/PHASE_s of every phase, time/iteration_s, and num_tokens over it."""
        total = sum(self.seconds.values())
        phases = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        return {**phases, "time/iteration_s": total, "time/tokens_per_s": num_tokens / total}
