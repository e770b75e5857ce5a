"""Where on the map of rewards a data set lies, and which settings follow.

PPO-GIL holds the data near the SFT model whose reward is high, and lets the other go. In the map of the miniature
(docs/results.md, "The map") that pays where the high reward is not to be trusted, and costs where it is: what decides
is how far the reward and somebody trusted agree in the high group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_gil.evaluation.statistics import Estimate

ONE_KL_FROM = 0.69
"""Spearman's correlation in the high group from which on one KL for all was the better choice. The map's worlds in
which groups gained lie at 0.61 and below, those in which they lost at 0.75 and above."""
GROUPS_OF_PROMPTS_FROM = 0.5
"""Below this kappa of two responses to one prompt the groups are less those of prompts than those of responses: of high
and low scores, which are no easy and hard data."""
NO_AGREEMENT = "Scores or trusted numbers are too few or do not vary"
"""Why a correlation is NaN."""
MOST_TIMES = 20
"""So many times as many rows are the most that is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far the reward and somebody trusted agree on the rows of one group: 1 wholly, 0 not at all."""

    value: Estimate
    """Spearman's correlation of score and trusted number, with its 95 % interval."""
    num_rows: int
    rows: str = "trusted rows"
    """What they are called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    line: str
    settings: Mapping[str, float]
    """Key -> value; empty where nothing follows."""
    is_certain: bool
    """The intervals leave no other advice."""


def groups_pay(high: Agreement) -> bool:
    return high.value.value < ONE_KL_FROM


def advise(high: Agreement | None, prompt_kappa: Estimate | None = None) -> Advice:
    """What follows from the agreement in the high group; None: no trusted row is there.

    prompt_kappa: how far the groups are those of prompts (measure.py); None where that is not known.
    """
    if prompt_kappa is not None and prompt_kappa.value < GROUPS_OF_PROMPTS_FROM:
        line = (
            "These are groups of high and low scores and not of prompts: the groups of two responses to one prompt "
            f"agree too little beyond chance (kappa {shown(prompt_kappa)}), as where a policy has not moved yet; "
            "audit the policy of a short run of PPO with KL (models.policy=PILOT models.ref_policy=SFT)"
        )
        return Advice(line=f"{line}.", settings={}, is_certain=False)
    if high is None or math.isnan(high.value.value):
        missing = "No trusted row lies in" if high is None else f"{NO_AGREEMENT} in the trusted rows of"
        line = f"{missing} the high group, and pairs do not tell whether groups pay; give audit.trusted rows like its "
        return Advice(line=f"{line}sampled ones.", settings={}, is_certain=False)
    if groups_pay(high):
        line = (
            f"{not_trusted(high)}: groups pay; gil.num_groups=2, and four trusted responses to each prompt would say "
        )
        line += "which KL targets"
        settings = {"gil.num_groups": 2}
    else:
        line, settings = one_kl(high), {"gil.num_groups": 1}
    doubtful = doubt(high)
    return Advice(line=f"{line}{doubtful}.", settings=settings, is_certain=not doubtful)


def advise_without_groups(name: str) -> Advice:
    """Where all but a few responses are in the group of that name."""
    line = (
        f"Nearly all responses are in {name}: there are no groups to treat apart, and PPO-GIL would be PPO with KL; "
        "gil.balance_coef=1 keeps learned groups from emptying"
    )
    return Advice(line=f"{line}.", settings={"gil.balance_coef": 1.0}, is_certain=True)


def advise_without_scores() -> Advice:
    """Where all responses have the same score."""
    line = "All of the policy's responses have the same score, from which a run would learn nothing, and there are no "
    line += "groups; audit a policy whose responses differ in score"
    return Advice(line=f"{line}.", settings={}, is_certain=True)


def not_trusted(high: Agreement) -> str:
    """Begins the line where groups pay."""
    return f"The reward is not to be trusted where it is high (agreement {_shown(high)})"


def one_kl(high: Agreement) -> str:
    """Begins the line where they do not."""
    line = f"The reward is to be trusted where it is high (agreement {_shown(high)}): PPO with one KL for all is the "
    return f"{line}better choice; gil.num_groups=1"


def doubt(high: Agreement) -> str:
    """A sentence on why the interval does not decide, and how many rows might; empty where it does."""
    value, low, high_end = high.value.value, high.value.low, high.value.high
    if math.isnan(value):
        return ""
    if math.isnan(low) or math.isnan(high_end):
        return ". Too few rows to decide: they are of one prompt, whose spread is unknown"
    if not low < ONE_KL_FROM <= high_end:
        return ""
    half, distance = max(high_end - value, value - low), abs(value - ONE_KL_FROM)
    times = max(2, math.ceil((half / distance) ** 2)) if distance > 0 else MOST_TIMES + 1
    wanted = f"about {times} times" if times <= MOST_TIMES else f"more than {MOST_TIMES} times"
    return f". Too few rows to decide: the interval holds {ONE_KL_FROM:g}; {wanted} as many in the high group would"


def _shown(found: Agreement) -> str:
    return f"{shown(found.value)}, Spearman's of {found.num_rows:,} {found.rows}"


def shown(found: Estimate) -> str:
    """With its interval, where that is known."""
    if math.isnan(found.value):
        return "-"
    return f"{found.value:.2f}" + ("" if math.isnan(found.low) else f" [{found.low:.2f}, {found.high:.2f}]")
