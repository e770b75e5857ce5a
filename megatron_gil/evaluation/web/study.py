"""What people are asked to rate: pairs of responses, in which order, on which side, and who rates which."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.comparisons import Comparison
from megatron_gil.evaluation.rubrics import Rubric

BLOCK = 20
"""Pairs. All raters come by the blocks in one order and by the pairs of a block in an order of their own. So those who
stop early have still rated the same pairs, without which there is no agreement to measure."""


@dataclass(frozen=True)
class Study:
    """The distinct comparisons, numbered in an order that follows from the seed and the texts alone."""

    policy: str
    """The name of the file that gave our responses."""
    opponents: Mapping[Comparison, tuple[str, ...]]
    """Every comparison, in order -> the names of the files that gave its other response."""
    rubric: Rubric
    seed: int

    @cached_property
    def items(self) -> tuple[Comparison, ...]:
        return tuple(self.opponents)

    @cached_property
    def to_rate(self) -> tuple[int, ...]:
        """Numbers of the items whose responses differ; the others are ties that nobody is asked about."""
        return tuple(item for item, comparison in enumerate(self.items) if not comparison.is_identical)

    def in_order(self, rater: str, share: Collection[int]) -> list[int]:
        """Items of a rater's share, in the order in which they are shown to that rater."""
        return sorted(share, key=lambda item: (item // BLOCK, _draw(self.seed, "order", rater, item)))

    def ours_first(self, rater: str, item: int) -> bool:
        """Whether our response is shown in the first place."""
        return _draw(self.seed, "side", rater, item) % 2 == 0

    def deal(
        self, raters: Sequence[str], overlap: int, rated: Mapping[int, Collection[str]]
    ) -> dict[str, frozenset[int]]:
        """Rater -> items, so that each item has `overlap` raters. Everybody's number of items is the same but for one,
        and raters share about equally many with one another.

        rated: item -> who has rated it already, former raters too; it stays theirs.
        """
        held: dict[str, set[int]] = {r: {item for item in self.to_rate if r in rated.get(item, ())} for r in raters}
        shared: dict[frozenset[str], int] = {}
        for item in self.to_rate:
            having = [r for r in raters if item in held[r]]
            for _ in range(overlap - len(rated.get(item, ()))):
                free = [r for r in raters if r not in having]
                if not free:
                    break
                chosen = min(
                    free,
                    key=lambda r: (
                        len(held[r]),
                        sum(shared.get(frozenset((r, other)), 0) for other in having),
                        _draw(self.seed, "deal", r, item),
                    ),
                )
                for other in having:
                    pair = frozenset((chosen, other))
                    shared[pair] = shared.get(pair, 0) + 1
                having.append(chosen)
                held[chosen].add(item)
        return {rater: frozenset(items) for rater, items in held.items()}


def make_study(rows: Mapping[str, Sequence[Comparison]], *, policy: str, rubric: Rubric, seed: int) -> Study:
    """rows: opponent -> its comparisons. Equal ones are one item. ConfigError where there is nothing to rate."""
    found: dict[Comparison, dict[str, None]] = {}
    for opponent, comparisons in rows.items():
        for number, comparison in enumerate(comparisons, start=1):
            if not _is_unicode(comparison):
                raise ConfigError(
                    f"{policy} and {opponent}: row {number} holds half of a surrogate pair (\\ud800 to \\udfff), which "
                    "is no character; generate it anew or take it out"
                )
            found.setdefault(comparison, {})[opponent] = None
    order = sorted(found, key=lambda c: _draw(seed, "item", c.prompt, c.ours, c.theirs))
    study = Study(policy=policy, opponents={c: tuple(found[c]) for c in order}, rubric=rubric, seed=seed)
    if not study.to_rate:
        raise ConfigError(f"{policy}: nothing to rate: in all {len(order)} pairs both responses are the same")
    return study


def _draw(seed: int, *names: str | int) -> int:
    """A uniform number below 2**64 that is a pure function of the arguments."""
    return int.from_bytes(hashlib.blake2b(json.dumps([seed, *names]).encode(), digest_size=8).digest(), "big")


def _is_unicode(comparison: Comparison) -> bool:
    try:
        f"{comparison.prompt}{comparison.ours}{comparison.theirs}".encode()
    except UnicodeEncodeError:
        return False
    return True
