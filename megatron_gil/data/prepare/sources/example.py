"""What every reader of a public data set makes of a row, and the tally of what it could not use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_gil.data.text.chat import Message, format_dialogue

NATIVE_ROWS = "rows"
"""The kind under which a native row is tallied where it gave no row of any kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt and the responses to it that a source has. A response begins with the space that separates it from the
    prompt."""

    prompt: str
    completion: str | None = None
    messages: list[Message] | None = None  # the whole conversation, where every assistant turn may be imitated
    chosen: str | None = None
    rejected: str | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts. read[file]: native rows of that file. dropped[kind, reason]: native rows that gave no row of this kind
    (kind "rows": no row at all), under the first reason that applied. noted[what]: oddities that were repaired or
    kept."""

    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, kind: str = NATIVE_ROWS) -> None:
        self.dropped[kind, reason] += 1

    def note(self, what: str) -> None:
        self.noted[what] += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a row comes from, and what the user chose about its source."""

    name: str  # path of the file, or name on the hub
    safe_rlhf_label: str = "safer"  # which of the two verdicts of PKU-SafeRLHF makes the preference: safer | better


Reader = Callable[[Mapping[str, Any], Origin, Tally], Example | None]
"""Reads one native row; None (and a tallied reason) where it cannot be used."""


def as_response(text: str, tally: Tally) -> str | None:
    """The text with exactly one space before it, as a response follows "Assistant:" or "TL;DR:"; None for no text."""
    bare = text.strip()
    if bare and text not in (bare, " " + bare):
        tally.note("spaces around a response made one before it")
    return " " + bare if bare else None


def as_prompt(question: str) -> str:
    return format_dialogue([{"role": "user", "content": question.strip()}])


def texts_of(row: Mapping[str, Any], *names: str) -> tuple[str, ...] | None:
    """The named fields where all are text, else None."""
    values = tuple(row.get(name) for name in names)
    return values if all(isinstance(value, str) for value in values) else None  # pyright: ignore[reportReturnType]


def as_pair(chosen: str | None, rejected: str | None, tally: Tally) -> tuple[str, str] | tuple[None, None]:
    """(chosen, rejected), or (None, None) and a tallied reason where the two make no preference."""
    if chosen is None or rejected is None:
        tally.drop("a response is empty", "preferences")
    elif chosen == rejected:
        tally.drop("both responses are equal", "preferences")
    else:
        return chosen, rejected
    return None, None
