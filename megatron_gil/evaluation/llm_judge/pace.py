"""When the next request may be sent. All workers share one pace, so that a busy server is left alone by all of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    tries: int = 7
    """Requests until a question counts as unanswered. One turned away as one too many (429) counts where nobody was
    answered since the one before."""
    most_tries: int = 100
    """Counting those as well."""
    slow_tries: int = 3
    """Of requests that reached their time limit."""
    first_pause_s: float = 0.5
    longest_pause_s: float = 60.0
    """Pauses grow twofold from the first to the longest, each shortened by chance by up to a half."""
    longest_wait_s: float = 3600.0
    """A server that asks for a longer pause (its quota of the day is used up) ends the evaluation."""

    def pause_s(self, failures: int) -> float:
        """After so many failures in a row."""
        longest = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(failures - 1, 30))
        return longest * random.uniform(0.5, 1.0)


class Pace:
    """At most `concurrency` requests in flight, evenly spaced where there is a limit a minute, none during a pause.

    A busy server halves the number in flight; each answer raises it again, by one for every round of requests.
    """

    def __init__(self, concurrency: int, patience: Patience, requests_per_minute: float | None = None) -> None:
        self._concurrency, self._patience = concurrency, patience
        self._allowed = float(concurrency)
        self._spacing_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._door, self._left = asyncio.Lock(), asyncio.Event()
        self._next_s = self._pause_until_s = self._halved_s = 0.0
        self._busy_in_a_row = 0
        self.in_flight = 0
        self.answered = 0

    def pause_left_s(self) -> float:
        return max(0.0, self._pause_until_s - time.monotonic())

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Around one request. Turns are given in the order in which they were asked for."""
        async with self._door:
            while True:
                wait_s = max(self._next_s, self._pause_until_s) - time.monotonic()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                elif self.in_flight >= max(1, int(self._allowed)):
                    self._left.clear()
                    await self._left.wait()
                else:
                    break
            self._next_s = time.monotonic() + self._spacing_s
            self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self._left.set()

    def was_answered(self) -> None:
        self.answered += 1
        self._busy_in_a_row = 0
        self._allowed = min(self._concurrency, self._allowed + 1.0 / self._allowed)

    def was_busy(self, sent_s: float, wait_s: float | None) -> None:
        """sent_s: when the request was sent, by the monotonic clock. wait_s: the pause that the server asks for, which
        is kept, and made longer from one time to the next: some ask for the same second however long they are busy."""
        pause_s = wait_s or 0.0
        if sent_s >= self._halved_s:  # once for all that were in flight together
            self._halved_s = time.monotonic()
            self._allowed = max(1.0, self._allowed / 2)
            self._busy_in_a_row += 1
            pause_s = max(pause_s, self._patience.pause_s(self._busy_in_a_row))
        self._pause_until_s = max(self._pause_until_s, time.monotonic() + pause_s)
