"""Win/tie/lose of one policy against others, in the form of the paper's Table 1, with intervals and a sign test."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_gil.evaluation.comparisons import Comparison, Judgment
from megatron_gil.evaluation.judge import Judge, Verdict
from megatron_gil.evaluation.statistics import Estimate, bootstrap, sign_test

MARGIN: Mapping[str, float] = {"win": 1.0, "tie": 0.0, "lose": -1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """Shares of prompts, in [0, 1]; win + tie + lose is 1. A prompt counts once: where it was judged several times, by
    several raters or with several responses, its verdicts are averaged. All NaN where nothing was judged."""

    num_prompts: int
    """Distinct ones with a verdict."""
    win: Estimate
    tie: Estimate
    lose: Estimate
    margin: Estimate
    """win - lose; its interval holds 0 where neither side is shown to be better."""
    sign_test: float
    """Exact two-sided p-value over the prompts that were not ties."""
    refused: int
    """Judgments that the judge would not give; they are in no share."""
    unanswered: int
    """Judgments of which no answer came; they are in no share."""


def judge_all(
    judge: Judge, comparisons: Iterable[Comparison], *, task: str = "", policy: str = "", opponent: str = ""
) -> list[Judgment]:
    """By a judge that always has a verdict. task, policy, opponent: names that the judgments bear."""
    return [
        Judgment(
            task=task,
            judge=judge.name,
            rater=judge.name,
            policy=policy,
            opponent=opponent,
            prompt=c.prompt,
            ours=c.ours,
            theirs=c.theirs,
            outcome=judge.compare(c.prompt, c.ours, c.theirs),
        )
        for c in comparisons
    ]


def win_rate(judgments: Sequence[Judgment]) -> WinRate:
    """Shares with 95 % bootstrap intervals over prompts."""
    prompts = list(by_prompt(judgments).values())

    def share(verdict: Verdict) -> Estimate:
        return bootstrap([fmean(float(j.outcome == verdict) for j in found) for found in prompts])

    margins = [fmean(MARGIN[j.outcome] for j in found) for found in prompts]
    return WinRate(
        num_prompts=len(prompts),
        win=share("win"),
        tie=share("tie"),
        lose=share("lose"),
        margin=bootstrap(margins),
        sign_test=sign_test(sum(m > 0 for m in margins), sum(m < 0 for m in margins)),
        refused=sum(j.outcome == "refused" for j in judgments),
        unanswered=sum(j.outcome == "unanswered" for j in judgments),
    )


def by_prompt(judgments: Iterable[Judgment]) -> dict[str, list[Judgment]]:
    """Those with a verdict, in the order in which the prompts appear."""
    found: dict[str, list[Judgment]] = {}
    for judgment in judgments:
        if judgment.outcome in MARGIN:
            found.setdefault(judgment.prompt, []).append(judgment)
    return found


HEADER = ("opponent", "prompts", "win %", "tie %", "lose %", "win - lose, % [95 %]", "p")


def table_rows(rates: Mapping[str, WinRate]) -> list[tuple[str, ...]]:
    """The cells below HEADER: a row per opponent. p: of the sign test."""
    return [
        (
            opponent,
            str(rate.num_prompts),
            *(percent(part.value) for part in (rate.win, rate.tie, rate.lose)),
            signed_percent(rate.margin),
            p_value(rate.sign_test),
        )
        for opponent, rate in rates.items()
    ]


def percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def signed_percent(share: Estimate) -> str:
    """With its interval."""
    if math.isnan(share.value):
        return "-"
    return f"{100 * share.value:+.1f} [{100 * share.low:+.1f}, {100 * share.high:+.1f}]"


def p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
