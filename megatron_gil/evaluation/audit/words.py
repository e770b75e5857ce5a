"""Which words tell a group's responses from the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class TypicalWord:
    word: str
    """In lower case."""
    here: float
    """Its share of the words of the group's responses."""
    everywhere: float
    """Its share of the words of all responses."""


def typical_words(part: Sequence[str], everything: Sequence[str], count: int) -> list[TypicalWord]:
    """The words whose share in `part` exceeds their share in `everything`, which holds it, the most; at most `count`.

    A word is a run of letters; in a language written without spaces that is a whole clause.
    """
    inside, outside = (Counter(word for text in texts for word in _words(text)) for texts in (part, everything))
    found = [
        TypicalWord(word=word, here=n / inside.total(), everywhere=outside[word] / outside.total())
        for word, n in inside.items()
    ]
    return sorted((w for w in found if w.here > w.everywhere), key=lambda w: w.everywhere - w.here)[:count]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
