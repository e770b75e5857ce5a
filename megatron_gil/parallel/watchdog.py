"""Ends every rank of a run, with a line that says why, when one of them dies, is stopped, fails or does not come.

Each rank writes signs of life into the process group's store, from a thread. Rank 0 reads all of them and writes a
verdict; the others read the verdict, and rank 0's signs in case it is the one. A rank that was killed is found
within HURRIED_S after a collective broke, one that was stopped within SILENCE_S. Both times are shortened where
parallel.timeout_s is small. Under NCCL, whose time-outs end the process without an exception, rank 0 judges first,
by the phases that ranks are in."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, Self

import torch.distributed as dist

from megatron_gil.config import ConfigError

INTERVAL_S = 1.0
HURRIED_S = 4.0
SILENCE_S = 30.0
VERDICT = "watchdog/verdict"

State = Literal["running", "broken", "failed", "left"]
"""broken: a collective of this rank failed, because another rank is gone. failed: this rank ends for a reason of its
own. left: it has ended, and has said why where something was wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    number: int
    """Phases entered so far; a rank with fewer than the others is behind."""
    phase: str
    since: float
    """time.monotonic() when it was entered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """What a rank says of itself."""

    beat: int
    state: State
    number: int
    phase: str
    seconds: float
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """The newest sign of a rank, and when (time.monotonic() here) its beat and its state last changed."""

    sign: Sign
    beat_at: float
    state_at: float


class Watchdog:
    """A context around everything that a rank does together with others; it watches from `join` on. With one rank it
    does nothing."""

    collectives_raise = True
    """Whether a collective that runs out of time raises an exception, as gloo's do. NCCL's end the process: then
    rank 0 judges before that, by the signs of life alone."""

    def __init__(self, where: Callable[[], Whereabouts], *, timeout_s: float) -> None:
        """where: this rank's whereabouts, asked from a thread."""
        self._where, self._rank, self._world_size = where, 0, 1
        self._interval = min(INTERVAL_S, timeout_s / 40)
        self._hurried, self._silence = min(HURRIED_S, timeout_s / 8), min(SILENCE_S, timeout_s / 2)
        self._timeout = timeout_s
        self._state: State = "running"
        self._detail, self._beat = "", 0
        self._heard: dict[int, Heard] = {}
        self._closed = threading.Event()
        self._answered = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def join(self, rank: int, world_size: int, store: dist.Store) -> None:
        """Begin to write this rank's signs of life into the store that all ranks see."""
        self._rank, self._world_size, self._answered = rank, world_size, time.monotonic()
        own = store.clone()  # type: ignore[attr-defined]  for the thread; the stubs lack it
        if rank == 0:
            own.set(VERDICT, "")
        self._say(own)
        self._threads = [
            threading.Thread(target=self._talk, args=(own,), name="watchdog", daemon=True),
            threading.Thread(target=self._guard, name="watchdog-guard", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """The rank goes. After a broken collective, wait first for rank 0's verdict, which names the lost rank; the
        exception does not."""
        if self._world_size > 1:
            if error is not None and is_broken_collective(error):
                self._detail, self._state = _first_line(error), "broken"
                time.sleep(4 * self._hurried)  # the verdict ends the process
            elif error is not None and not isinstance(error, ConfigError):
                self.failed(f"{type(error).__name__}: {_first_line(error)}")
            elif self._state == "running":
                self._state = "left"
            self._closed.set()
            self._threads[0].join(timeout=self._hurried)

    def failed(self, reason: str) -> None:
        """This rank ends for a reason of its own; the others are told it."""
        self._detail, self._state = reason, "failed"

    def _talk(self, store: dist.Store) -> None:
        watched = range(self._world_size) if self._rank == 0 else [0]
        keys = [*(_key(rank) for rank in watched), VERDICT]
        try:
            while not self._closed.wait(self._interval):
                self._say(store)
                self._answered = time.monotonic()
                if not store.check(keys):
                    continue  # not all have joined
                *found, verdict = (text.decode() for text in store.multi_get(keys))
                self._answered = time.monotonic()
                verdict = verdict or self._judge(self._listen(dict(zip(watched, found, strict=True))))
                if verdict:
                    store.set(VERDICT, verdict)
                    self._end(verdict)
            self._say(store)
        except RuntimeError:  # the store is gone (DistError is a RuntimeError)
            self._lose_store()

    def _say(self, store: dist.Store) -> Sign:
        where = self._where()
        self._beat += 1
        sign = Sign(
            beat=self._beat,
            state=self._state,
            number=where.number,
            phase=where.phase,
            seconds=time.monotonic() - where.since,
            detail=self._detail,
        )
        store.set(_key(self._rank), json.dumps(asdict(sign)))
        return sign

    def _listen(self, found: dict[int, str]) -> dict[int, Heard]:
        now = time.monotonic()
        for rank, text in found.items():
            sign = Sign(**json.loads(text))
            before = self._heard.get(rank, Heard(sign=sign, beat_at=now, state_at=now))
            self._heard[rank] = Heard(
                sign=sign,
                beat_at=now if sign.beat != before.sign.beat else before.beat_at,
                state_at=now if sign.state != before.sign.state else before.state_at,
            )
        return self._heard

    def _judge(self, heard: dict[int, Heard]) -> str:
        broken = self._state == "broken" or any(h.sign.state == "broken" for h in heard.values())
        lost = find_lost(heard, time.monotonic(), broken=broken, hurried_s=self._hurried, silence_s=self._silence)
        if lost or self._rank != 0:
            return lost
        late = find_late(heard, time.monotonic(), hurried_s=self._hurried)
        return late or ("" if self.collectives_raise else find_behind(heard, timeout_s=self._timeout))

    def _lose_store(self) -> None:
        """The store is hosted by rank 0, or by torchrun on rank 0's machine. Where it is lost, its host is."""
        if not self._closed.wait(self._hurried):
            self._end("the store of rank 0 is gone: rank 0, or torchrun on its machine, died" + self._last_of_rank_0())

    def _guard(self) -> None:
        """Ends this rank where the store has not answered for long: if a stopped rank 0 hosts it, `_talk` waits for
        ever."""
        while not self._closed.wait(self._interval):
            silent = time.monotonic() - self._answered
            if silent > self._silence + 2 * self._hurried:
                self._end(f"the store of rank 0 has not answered for {silent:.0f} s" + self._last_of_rank_0())

    def _last_of_rank_0(self) -> str:
        return f"; it was last heard of in {self._heard[0].sign.phase}" if 0 in self._heard else ""

    def _end(self, verdict: str) -> None:
        if self._closed.is_set() or self._state == "failed":
            return  # it is ending by itself
        where = self._where()
        waited = time.monotonic() - where.since
        line = f"megatron-gil: rank {self._rank} ends, {waited:.0f} s into {where.phase}: {verdict}\n"
        sys.stderr.write(line)
        sys.stderr.flush()
        if self._rank == 0:
            time.sleep(3 * self._interval)  # rank 0 may host the store: the others still read it
        os._exit(1)


def find_lost(heard: dict[int, Heard], now: float, *, broken: bool, hurried_s: float, silence_s: float) -> str:
    """Which rank is dead, stopped or failed; empty if none is. broken: whether a collective has failed somewhere."""
    for rank, h in heard.items():
        if h.sign.state == "failed":
            return f"rank {rank} failed in {h.sign.phase}: {h.sign.detail}"
    for rank, h in heard.items():
        silent_s = now - h.beat_at
        if silent_s > (hurried_s if broken else silence_s):
            gone = "left" if h.sign.state == "left" else "was killed or stopped"
            if broken or h.sign.state != "left":
                return f"rank {rank} {gone}: no sign of it for {silent_s:.0f} s, the last from {h.sign.phase}"
    return ""


def find_late(heard: dict[int, Heard], now: float, *, hurried_s: float) -> str:
    """Of ranks that all live, the one that kept the others waiting until a collective ran out of time."""
    if max((now - h.state_at for h in heard.values() if h.sign.state == "broken"), default=0.0) <= 2 * hurried_s:
        return ""
    late = min(heard, key=lambda rank: (heard[rank].sign.state == "broken", heard[rank].sign.number))
    sign = heard[late].sign
    if sign.state == "broken":
        return f"rank {late} lost its connection in {sign.phase}: {sign.detail}"
    return f"rank {late} did not come to a collective: it has been in {sign.phase} for {sign.seconds:.0f} s"


def find_behind(heard: dict[int, Heard], *, timeout_s: float) -> str:
    """Of ranks that all live, the one that others have waited for longer than the time-out, as far as phases tell.

    Ranks enter the same phases in the same order. One that is in an earlier phase than another is late once both have
    been where they are for the time-out. Ranks that hang in one phase cannot be told apart from ranks that work.
    """
    signs = {rank: h.sign for rank, h in heard.items() if h.sign.state == "running"}
    if not signs:
        return ""
    late, ahead = (choose(signs, key=lambda rank: signs[rank].number) for choose in (min, max))
    waited = min(signs[late].seconds, signs[ahead].seconds)
    if signs[late].number == signs[ahead].number or waited <= timeout_s:
        return ""
    return (
        f"rank {late} keeps the others waiting: it has been in {signs[late].phase} for {signs[late].seconds:.0f} s, "
        f"rank {ahead} waits in {signs[ahead].phase} for {signs[ahead].seconds:.0f} s, longer than parallel.timeout_s"
    )


def is_broken_collective(error: BaseException) -> bool:
    """Whether an exception is what a collective raises when another rank is gone (gloo has no class of its own)."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _key(rank: int) -> str:
    return f"watchdog/rank_{rank}"
