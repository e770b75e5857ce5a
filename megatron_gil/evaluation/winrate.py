"""Win/tie/lose of one set of responses against others, in the form of the paper's Table 1, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_gil.evaluation.comparisons import Comparison
from megatron_gil.evaluation.judge import Judge, Verdict
from megatron_gil.evaluation.statistics import Estimate, bootstrap


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """Shares of prompts, in [0, 1]; win + tie + lose is 1."""

    num_prompts: int
    win: Estimate
    tie: Estimate
    lose: Estimate
    margin: Estimate
    """win - lose; its interval holds 0 where neither side is shown to be better."""


def verdicts(judge: Judge, comparisons: Iterable[Comparison]) -> list[Verdict]:
    """One verdict a comparison, as seen from ours."""
    return [judge.compare(c.prompt, c.ours, c.theirs) for c in comparisons]


def win_rate(found: Sequence[Verdict], *, seed: int = 0) -> WinRate:
    """Shares with 95 % bootstrap intervals over prompts."""

    def share(verdict: Verdict) -> Estimate:
        return bootstrap([float(v == verdict) for v in found], seed=seed)

    return WinRate(
        num_prompts=len(found),
        win=share("win"),
        tie=share("tie"),
        lose=share("lose"),
        margin=bootstrap([float(v == "win") - float(v == "lose") for v in found], seed=seed),
    )


HEADER = ("opponent", "prompts", "win %", "tie %", "lose %", "win - lose, % [95 %]")


def table_rows(rates: Mapping[str, WinRate]) -> list[tuple[str, ...]]:
    """The cells below HEADER: a row per opponent."""
    return [
        (
            opponent,
            str(rate.num_prompts),
            *(f"{100 * part.value:.1f}" for part in (rate.win, rate.tie, rate.lose)),
            f"{100 * rate.margin.value:+.1f} [{100 * rate.margin.low:+.1f}, {100 * rate.margin.high:+.1f}]",
        )
        for opponent, rate in rates.items()
    ]
