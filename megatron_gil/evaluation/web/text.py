"""Untrusted text cut into the parts that a page shows: turns of a chat, code, and characters that cannot be seen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_FENCE = re.compile(r"^ {0,3}```")
_HIDDEN = re.compile("([\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff])")
"""Controls, and characters that turn the direction of what follows or have no width. Those that join letters and
pictures (U+200C, U+200D) stay as they are."""


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    is_hidden: bool
    """The name of a character that cannot be seen, in its place."""


@dataclass(frozen=True, slots=True)
class Passage:
    pieces: tuple[Piece, ...]
    is_code: bool
    """Between two lines of ```."""


@dataclass(frozen=True, slots=True)
class Turn:
    speaker: str
    """Empty for a text that is no chat."""
    passages: tuple[Passage, ...]


def turns(prompt: str) -> list[Turn]:
    """Of a chat as it stands in HH-RLHF, "\\n\\nHuman: ... \\n\\nAssistant: ..."; any other text is one turn. The empty
    turn at the end, which the response fills, is left out."""
    text = _lines(prompt).strip()
    if not text.startswith("Human:"):
        return [Turn("", passages(text))]
    _, *cut = _TURN.split(text)
    said = [(speaker, words.strip()) for speaker, words in zip(cut[::2], cut[1::2], strict=True)]
    if said[-1] == ("Assistant", ""):
        said.pop()
    return [Turn(speaker, passages(words)) for speaker, words in said]


def passages(text: str) -> tuple[Passage, ...]:
    """None for an empty text. Spaces around it are left out: they could tell the sides apart, and mean nothing."""
    found: list[tuple[bool, list[str]]] = []
    in_code = False
    for line in _lines(text).strip().split("\n"):
        is_fence = bool(_FENCE.match(line))
        is_code = in_code or is_fence
        starts = not found or found[-1][0] != is_code or (is_fence and not in_code)
        if starts:
            found.append((is_code, []))
        found[-1][1].append(line)
        if is_fence:
            in_code = not in_code
    cut = ((is_code, "\n".join(lines)) for is_code, lines in found)
    return tuple(Passage(tuple(_pieces(words)), is_code) for is_code, words in cut if words)


def _pieces(text: str) -> Iterator[Piece]:
    for i, part in enumerate(_HIDDEN.split(text)):
        if part:
            yield Piece(f"U+{ord(part):04X}", True) if i % 2 else Piece(part, False)


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
