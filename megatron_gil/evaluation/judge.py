"""What decides which of two responses is better: one interface, several judges."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol

from megatron_gil.config import ConfigError

Verdict = Literal["win", "tie", "lose"]
"""Of the first of two responses."""

ScoreFn = Callable[[str, str], float]
"""(prompt, response) -> a number, higher is better."""


class Judge(Protocol):
    name: str

    def compare(self, prompt: str, a: str, b: str) -> Verdict:
        """The verdict for response a against response b; b against a gives the opposite one."""
        ...


class ScoreJudge:
    """Decides by a score of each response: the gold score of the miniature, or a reward model's."""

    def __init__(self, name: str, score: ScoreFn, *, tie_margin: float = 0.0) -> None:
        """tie_margin: a difference of at most this much is a tie."""
        self.name, self._score, self._tie_margin = name, score, tie_margin

    def compare(self, prompt: str, a: str, b: str) -> Verdict:
        difference = self._score(prompt, a) - self._score(prompt, b)
        if abs(difference) <= self._tie_margin:
            return "tie"
        return "win" if difference > 0 else "lose"


def opposite(verdict: Verdict) -> Verdict:
    flipped: Mapping[Verdict, Verdict] = {"win": "lose", "tie": "tie", "lose": "win"}
    return flipped[verdict]


def is_comparable(score: object) -> bool:
    """False for NaN and infinity. (NaN would lose against everything.)"""
    return not isinstance(score, int | float) or -sys.float_info.max <= score <= sys.float_info.max


def recorded_scores(rows: Iterable[Mapping[str, object]], source: str) -> ScoreFn:
    """A score function that looks up scores written beforehand, as by `megatron-gil score`: rows of {"prompt",
    "response", "score"}.

    Raises ConfigError, naming the source and the field, for a row without a score and for a response that has none.
    """
    scores: dict[tuple[object, object], float] = {}
    for number, row in enumerate(rows, start=1):
        score = row.get("score")
        if not isinstance(score, int | float) or isinstance(score, bool):
            raise ConfigError(f'{source}: row {number} has no number "score"; write one with `megatron-gil score`')
        if not is_comparable(score):
            raise ConfigError(f"{source}: row {number} has the score {score}, which cannot be compared")
        scores[row.get("prompt"), row.get("response")] = float(score)

    def score_of(prompt: str, response: str) -> float:
        if (prompt, response) not in scores:
            raise ConfigError(
                f"{source}: no score for the response {response[:60]!r} to {prompt[:60]!r}; score that file"
            )
        return scores[prompt, response]

    return score_of
