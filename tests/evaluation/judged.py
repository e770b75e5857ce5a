"""Judgments for tests."""

from __future__ import annotations

from megatron_gil.evaluation.comparisons import Judgment, Outcome
from megatron_gil.evaluation.judge import Verdict


def judged(
    outcome: Outcome,
    prompt: str = "p",
    *,
    ours: str = "ours",
    theirs: str = "theirs",
    judge: str = "j",
    rater: str | None = None,
    task: str = "t",
    opponent: str = "o",
    ours_first: Verdict | None = None,
    theirs_first: Verdict | None = None,
) -> Judgment:
    return Judgment(
        task=task,
        judge=judge,
        rater=rater or judge,
        policy="us",
        opponent=opponent,
        prompt=prompt,
        ours=ours,
        theirs=theirs,
        outcome=outcome,
        ours_first=ours_first,
        theirs_first=theirs_first,
    )
