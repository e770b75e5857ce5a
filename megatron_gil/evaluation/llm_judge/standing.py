"""What follows from the answers that a question has got: a verdict, a refusal, or what is asked next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_gil.evaluation.comparisons import Outcome
from megatron_gil.evaluation.judge import Verdict, opposite
from megatron_gil.evaluation.llm_judge.answers import Answer

ATTEMPTS = 3
"""Answers without a verdict that make a refusal."""
LARGER = 4
"""The limit on tokens grows by this factor, once, for an answer that was cut."""
WARMER = 0.7
"""At temperature 0 a model would answer in the same wrong form again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    state: Literal["open", "verdict", "refused", "unanswered"]
    verdict: Verdict | None = None
    """For the first response."""
    reason: str = ""
    """Why there is none."""
    temperature: float = 0.0
    """Of the next request of an open question."""
    max_tokens: int = 0


def standing_of(answers: Sequence[Answer], *, base_url: str, max_tokens: int) -> Standing:
    """max_tokens: the user's limit. An answer that was cut at a lower one does not count, nor that a text is too long
    for another server or with another limit."""
    held = [a for a in answers if _holds(a, base_url, max_tokens)]
    for answer in held:
        if answer.kind == "verdict":
            return Standing(state="verdict", verdict=answer.verdict)
        if answer.kind in ("refused", "too_long"):
            return Standing(state="refused", reason=answer.reason)
    num_cut = sum(a.kind == "cut" for a in held)
    if num_cut > 1:
        return Standing(state="refused", reason="cut before its verdict; a larger --max-tokens asks again")
    if len(held) >= ATTEMPTS:
        return Standing(state="refused", reason=f"{ATTEMPTS} answers without a last line VERDICT: A, B or TIE")
    return Standing(
        state="open",
        temperature=WARMER if len(held) > num_cut else 0.0,
        max_tokens=max_tokens * LARGER if num_cut else max_tokens,
    )


def _holds(answer: Answer, base_url: str, max_tokens: int) -> bool:
    if answer.kind == "cut":
        return answer.max_tokens >= max_tokens
    if answer.kind == "too_long":
        return answer.base_url == base_url and answer.max_tokens <= max_tokens * LARGER
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruling:
    """On one comparison; verdicts as seen from ours."""

    outcome: Outcome
    ours_first: Verdict | None = None
    theirs_first: Verdict | None = None


IDENTICAL = Ruling(outcome="tie")


def ruling_of(ours_first: Standing, theirs_first: Standing) -> Ruling:
    """Both orders agree on a verdict, or it is a tie; one order that is refused settles it, whatever the other says."""
    one = ours_first.verdict
    other = None if theirs_first.verdict is None else opposite(theirs_first.verdict)
    states = (ours_first.state, theirs_first.state)
    if one is not None and other is not None:
        outcome: Outcome = one if one == other else "tie"
    else:
        outcome = "refused" if "refused" in states else "unanswered"
    return Ruling(outcome=outcome, ours_first=one, theirs_first=other)
