"""Where on the map of rewards a data set lies, and which settings of gil.* follow.

The rule looks at the low group, the one whose score is lower. PPO-GIL frees it of its KL penalty, which is right where
the reward model is to be trusted on it, and where it is not, hands it over to the reward model's mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_gil.evaluation.statistics import Estimate

TRUSTED_IN_PART_FROM = 0.4
"""Below this agreement the reward model is not to be trusted on the low group. Preliminary: not yet measured."""
TRUSTED_FROM = 0.7
"""From this agreement on it is. Preliminary: not yet measured."""
GROUPS_OF_PROMPTS_FROM = 0.5
"""Below this kappa of two responses to one prompt the groups are less those of prompts than those of responses: of high
and low scores, which are no easy and hard data."""
MOST_TIMES = 20
"""So many times as many rows are the most that is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far the reward model and somebody trusted agree on the rows of one group: 1 wholly, 0 not at all."""

    value: Estimate
    """With its 95 % interval."""
    num_rows: int
    measure: str
    """What the value is and of what, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    line: str
    settings: Mapping[str, float]
    """gil.* key -> value; empty where nothing follows."""
    is_certain: bool
    """The interval lies in one region of the map."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Agreements from the `start` of this region to that of the next."""

    start: float
    name: str
    text: str
    settings: Mapping[str, float]


REGIONS = (
    Region(
        start=-math.inf,
        name="not to be trusted",
        text="Reward not to be trusted on the low group: do not free it of its KL (this is PPO with KL)",
        settings={"gil.kl_floor": 1.0, "gil.invariance_coef": 0.0},
    ),
    Region(
        start=TRUSTED_IN_PART_FROM,
        name="trusted in part",
        text="Reward trusted in part on the low group: free it of some of its KL",
        settings={"gil.kl_floor": 0.33},
    ),
    Region(
        start=TRUSTED_FROM,
        name="trusted",
        text="Reward trusted on the low group: free it of most of its KL",
        settings={"gil.kl_floor": 0.1},
    ),
)


def agreement_of_pairs(accuracy: Estimate, num_pairs: int) -> Agreement:
    """2 x accuracy - 1 of preference pairs: Kendall's correlation of two orders of two."""
    value, low, high = (2 * end - 1 for end in (accuracy.value, accuracy.low, accuracy.high))
    measure = f"2 x accuracy - 1 of {num_pairs:,} pairs"
    return Agreement(value=Estimate(value=value, low=low, high=high), num_rows=num_pairs, measure=measure)


def agreement_of_trusted(spearman: Estimate, num_rows: int) -> Agreement:
    """Spearman's correlation of score and trusted number."""
    return Agreement(value=spearman, num_rows=num_rows, measure=f"Spearman's of {num_rows:,} trusted rows")


def advise(low: Agreement | None, high: Agreement | None, prompt_kappa: Estimate | None = None) -> Advice:
    """What follows from the agreement in the low and in the high group; None: no row of that group is measured.

    Without a number for the low group nothing follows, and the line says what is missing. prompt_kappa: how far the
    groups are those of prompts (measure.py); None where that is not known.
    """
    if prompt_kappa is not None and prompt_kappa.value < GROUPS_OF_PROMPTS_FROM:
        line = (
            "These are groups of high and low scores and not of prompts: two responses to one prompt share a group "
            f"little more often than by chance (kappa {prompt_kappa.value:.2f}), as where a policy has not moved yet; "
            "audit the policy of a short run of PPO with KL (models.policy=PILOT models.ref_policy=SFT)"
        )
        return Advice(line=f"{line}.", settings={}, is_certain=False)
    if low is None or math.isnan(low.value.value):
        missing = "No measured row lies in" if low is None else "The numbers do not vary in the rows of"
        line = f"{missing} the low group, so nothing follows for gil.kl_floor; give rows like its sampled ones"
        return Advice(line=line, settings={}, is_certain=False)
    region, value = region_of(low.value.value), low.value
    ends = [end for end in (value.low, value.high) if not math.isnan(end)]
    reached = [r for r in REGIONS if any(region_of(end) is r for end in ends) and r is not region]
    is_certain = len(ends) == 2 and not reached
    settings = " ".join(f"{key}={number:g}" for key, number in region.settings.items())
    line = f"{region.text}; {settings}. Agreement in the low group {_shown(low)}"
    if high is not None and not math.isnan(high.value.value):
        line += f", in the high group {_shown(high)}"
    if not is_certain:
        line += f". Too few rows to decide: {_doubt(low, reached)}"
    return Advice(line=f"{line}.", settings=region.settings, is_certain=is_certain)


def advise_without_groups(name: str) -> Advice:
    """Where all but a few responses are in the group of that name."""
    line = (
        f"The classifier puts nearly all responses into {name}: there are no groups to treat apart, and PPO-GIL would "
        "be PPO with KL; gil.balance_coef=1 keeps groups from emptying"
    )
    return Advice(line=f"{line}.", settings={"gil.balance_coef": 1.0}, is_certain=True)


def region_of(agreement: float) -> Region:
    return max((r for r in REGIONS if r.start <= agreement), key=lambda r: r.start)


def _shown(found: Agreement) -> str:
    value = found.value
    interval = "" if math.isnan(value.low) else f" [{value.low:.2f}, {value.high:.2f}]"
    return f"{value.value:.2f}{interval} ({found.measure})"


def _doubt(found: Agreement, reached: list[Region]) -> str:
    """Why the interval does not decide, and how many rows might."""
    if not reached:
        return "they are of one prompt, whose spread is unknown"
    names = " and ".join(f'"{region.name}"' for region in reached)
    value = found.value.value
    distance = min(abs(value - region.start) for region in REGIONS)
    half = max(found.value.high - value, value - found.value.low)
    times = math.ceil((half / distance) ** 2) if distance > 0 else MOST_TIMES + 1
    wanted = f"about {max(2, times)} times" if times <= MOST_TIMES else f"more than {MOST_TIMES} times"
    return f"the interval reaches {names}; {wanted} as many in the low group would"
