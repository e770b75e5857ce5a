"""What an evaluation has done and still has to do, on a terminal and in a log."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_gil.evaluation.comparisons import Comparison
from megatron_gil.evaluation.llm_judge.cost import Budget
from megatron_gil.evaluation.llm_judge.pace import Pace
from megatron_gil.evaluation.llm_judge.standing import Standing, ruling_of

FIRST_LINE_S, LINE_S, REFRESH_S = 3.0, 10.0, 0.25
LONG_S = 5.0
"""A request that waits longer is told of."""
_WINDOW_S = 60.0
_LONGEST_TROUBLE, _MOST_REASONS = 100, 6


@dataclass(slots=True)
class Tally:
    """Counts of this run; comparisons count once, however often they are repeated."""

    keys: Mapping[Comparison, tuple[str, str]]
    started_s: float = field(default_factory=time.monotonic)
    standings: dict[str, Standing] = field(default_factory=dict)
    """Of the questions that are done with."""
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(refused or unanswered, why) of comparisons."""
    done: int = 0
    requests: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    trouble: str = ""
    """What went wrong last, if nothing was answered since."""
    sent_s: dict[int, float] = field(default_factory=dict)
    """When each request in flight was sent."""
    _of_key: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    _pace: deque[tuple[float, int]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        for pair in self.keys.values():
            for key in set(pair):  # one, where they differ in nothing that is sent
                self._of_key[key].append(pair)

    def settle(self, key: str, standing: Standing) -> None:
        self.standings[key] = standing
        for pair in self._of_key[key]:
            if all(other in self.standings for other in pair):
                self.done += 1
                both = [self.standings[other] for other in pair]
                outcome = ruling_of(*both).outcome
                if outcome in ("refused", "unanswered"):
                    why = next(standing.reason for standing in both if standing.state == outcome)
                    self.reasons[outcome, why] += 1

    def has_answer(self) -> bool:
        """Of this run or one before."""
        return any(standing.state != "unanswered" for standing in self.standings.values())

    def num(self, outcome: str) -> int:
        return sum(count for (name, _), count in self.reasons.items() if name == outcome)

    def begin(self) -> None:
        """From here on time and pace are counted."""
        self.started_s = time.monotonic()
        self._pace.append((self.started_s, len(self.standings)))

    def left_s(self) -> float | None:
        """By the pace of the last minute; None where there is none yet."""
        now, num = time.monotonic(), len(self.standings)
        while len(self._pace) > 2 and now - self._pace[1][0] > _WINDOW_S:
            self._pace.popleft()
        if now - self._pace[-1][0] > 1.0:
            self._pace.append((now, num))
        since, before = self._pace[0]
        return (len(self._of_key) - num) * (now - since) / (num - before) if num > before else None

    def line(self, budget: Budget, pace: Pace | None = None) -> str:
        """pace: where it goes on."""
        total = len(self.keys)
        parts = [f"{self.done:,} of {total:,} comparisons ({100 * self.done // max(1, total)} %)"]
        parts[0] += f" in {_clock(time.monotonic() - self.started_s)}"
        if pace is not None:
            left_s = self.left_s()
            parts[0] += ", time left not known yet" if left_s is None else f", about {_clock(left_s)} left"
        parts.append(f"{many(self.requests, 'request')}, {many(self.retries, 'retry')}")
        parts.append(f"{self.num('refused'):,} refused, {self.num('unanswered'):,} unanswered")
        parts.append(f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out")
        if budget.price is not None:
            limit = "" if budget.limit is None else f" of at most {budget.limit:g}"
            parts.append(f"cost {budget.spent:.4f}{limit}")
        if pace is not None and (pause_s := pace.pause_left_s()):
            parts.append(f"the server is busy, pausing for {_clock(pause_s + 1)}")
        elif pace is not None and self.sent_s:
            waited_s = time.monotonic() - min(self.sent_s.values())
            if waited_s > LONG_S or not self.standings:
                since = time.strftime("%H:%M:%S", time.localtime(time.time() - waited_s))
                parts.append(f"waiting for an answer since {since} ({_clock(waited_s)}), {len(self.sent_s)} in flight")
        if pace is not None and self.trouble:
            parts.append(f"last: {self.trouble[:_LONGEST_TROUBLE]}")
        return "; ".join(parts)

    def why(self) -> list[str]:
        """A line for each of the commonest reasons; those that differ in numbers alone are one."""
        counts: Counter[tuple[str, str]] = Counter()
        examples: dict[tuple[str, str], str] = {}
        for (outcome, reason), count in self.reasons.items():
            kind = outcome, re.sub(r"\d+", "0", reason)
            counts[kind] += count
            examples.setdefault(kind, reason)
        return [f"{kind[0]} {count:,}: {examples[kind]}" for kind, count in counts.most_common(_MOST_REASONS)]


class Display:
    """A bar on a terminal; in a log a line now and then."""

    def __init__(self, tally: Tally, budget: Budget, pace: Pace, console: Console) -> None:
        self._tally, self._budget, self._pace, self._console = tally, budget, pace, console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        if console.is_dumb_terminal:
            self._live = None

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    async def run(self) -> None:
        """Until it is cancelled."""
        if self._live is None:
            await asyncio.sleep(FIRST_LINE_S)
            while True:
                self.say(self._tally.line(self._budget, self._pace))
                await asyncio.sleep(LINE_S)
        with self._live:
            while True:
                self._live.update(self._shown(), refresh=True)
                await asyncio.sleep(REFRESH_S)

    def _shown(self) -> Any:
        bar = ProgressBar(total=max(1, len(self._tally.keys)), completed=self._tally.done, width=40)
        shown = Table.grid()
        shown.add_row(bar)
        shown.add_row(Text(self._tally.line(self._budget, self._pace)))
        return shown


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(min(seconds, 1e8)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def many(count: int, name: str) -> str:
    several = f"{name[:-1]}ies" if name.endswith("y") else f"{name}s"
    return f"{count:,} {name if count == 1 else several}"


def listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (" and others" if len(names) > most else "")
