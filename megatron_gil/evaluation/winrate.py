"""Win/tie/lose of one set of responses against others, in the form of the paper's Table 1, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.judge import Judge, Verdict
from megatron_gil.evaluation.statistics import Estimate, bootstrap

Row = Mapping[str, str]
"""{"prompt", "response"}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """Shares of prompts, in [0, 1]; win + tie + lose is 1."""

    num_prompts: int
    win: Estimate
    tie: Estimate
    lose: Estimate
    margin: Estimate
    """win - lose; its interval holds 0 where neither side is shown to be better."""


def verdicts(judge: Judge, ours: Sequence[Row], theirs: Sequence[Row]) -> list[Verdict]:
    """One verdict per prompt, as seen from ours. Row i of both files must answer the same prompt, else ConfigError."""
    if len(ours) != len(theirs):
        raise ConfigError(
            f"{len(ours)} responses cannot be paired with {len(theirs)}; generate both from one prompt file"
        )
    found: list[Verdict] = []
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        if mine["prompt"] != other["prompt"]:
            raise ConfigError(
                f"row {number}: the prompts differ ({mine['prompt'][:40]!r}, {other['prompt'][:40]!r}); "
                "generate both from one prompt file"
            )
        found.append(judge.compare(mine["prompt"], mine["response"], other["response"]))
    return found


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
