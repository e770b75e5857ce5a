"""How far the reward can be followed in each group, from trusted numbers of several responses to a prompt, and the KL
targets that follow."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from megatron_gil.evaluation.audit.advice import NO_AGREEMENT, Advice, Agreement, doubt, groups_pay, not_trusted, one_kl
from megatron_gil.evaluation.audit.correlation import correlate
from megatron_gil.evaluation.audit.rows import TrustedRow
from megatron_gil.evaluation.best_of_n import BestOfN, Candidates, KlPrice, kl_price

HIGH, LOW = "high score", "low score"
"""Groups of prompts, by the mean score of their responses."""
LEAST_RESPONSES = 4
"""To a prompt; of fewer the best says little."""
LEAST_TARGET = 0.05
"""Nats a response, where the reward's choice is no better than any response."""
SplitPrompts = dict[str, list[list[TrustedRow]]]
"""HIGH and LOW -> the responses to each of its prompts, of which there is at least one."""


def price_of(groups: SplitPrompts) -> KlPrice:
    return kl_price(
        [
            Candidates(group=name, scores=[row.score for row in part], trusted=[row.trusted for row in part])
            for name, prompts in groups.items()
            for part in prompts
        ]
    )


def agreement_on_high(groups: SplitPrompts) -> Agreement:
    found = [row for part in groups[HIGH] for row in part]
    together = correlate([row.score for row in found], [row.trusted for row in found], [row.prompt for row in found])
    return Agreement(value=together.spearman, num_rows=len(found), rows="responses to the prompts of high score")


def split_prompts(rows: Sequence[TrustedRow]) -> SplitPrompts | None:
    """The prompts with LEAST_RESPONSES responses or more; None where there are none of one group.

    While a policy is at rest the classifier tells responses apart by their scores, two responses to one prompt too. A
    run's groups are those of prompts, and follow their scores: so prompts are split by the mean score of their
    responses, at the threshold with the largest variance between the two sides (Otsu 1979), which is what the
    classifier maximises, with both sides held to a fair mass.
    """
    by_prompt: dict[str, list[TrustedRow]] = defaultdict(list)
    for row in rows:
        by_prompt[row.prompt].append(row)
    found = [part for part in by_prompt.values() if len(part) >= LEAST_RESPONSES]
    means = [fmean(row.score for row in part) for part in found]
    if len(set(means)) < 2:
        return None
    threshold = split_at(means)
    groups: SplitPrompts = {HIGH: [], LOW: []}
    for mean, part in zip(means, found, strict=True):
        groups[HIGH if mean >= threshold else LOW].append(part)
    return groups


def split_at(values: Sequence[float]) -> float:
    """The value from which on the upper side begins: of all cuts of the sorted values that with the largest n_0 n_1
    (mean_1 - mean_0)^2. At least two different values."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    counts, sums = np.arange(1, len(ordered)), np.cumsum(ordered)
    rest = len(ordered) - counts
    between = counts * rest * ((sums[-1] - sums[:-1]) / rest - sums[:-1] / counts) ** 2
    between[ordered[1:] == ordered[:-1]] = -1.0  # equal values stay together
    return float(ordered[int(between.argmax()) + 1])


def advise_targets(price: KlPrice, high: Agreement) -> Advice:
    """Where the reward is to be trusted in the high group, one KL; else gil.kl_target_high and gil.kl_target_low, at
    which the best of n has the largest trusted number in either group, or one target for all where that is the same
    n."""
    of_high, of_low = price.groups[HIGH], price.groups[LOW]
    unknown = math.isnan(high.value.value)
    if unknown or groups_pay(high):
        settings = kl_targets(price)
        line = _reasons(price, high, settings)
    else:
        settings, line = {"gil.num_groups": 1}, one_kl(high)
    apart = of_high.best_n_high < of_low.best_n_low or of_low.best_n_high < of_high.best_n_low
    doubtful = doubt(high)
    is_certain = not (doubtful or unknown)
    if is_certain and "gil.kl_target_high" in settings and not apart:
        line += ". The intervals of n overlap: more prompts or responses would tell the groups apart better"
        is_certain = False
    return Advice(line=f"{line}{doubtful}.", settings=settings, is_certain=is_certain)


def kl_targets(price: KlPrice) -> dict[str, float]:
    """The settings that hold each group where its best of n has the largest trusted number."""
    of_high, of_low = price.groups[HIGH], price.groups[LOW]
    if of_high.best_n == of_low.best_n:
        return {"gil.num_groups": 1, "ppo.kl_target": _target(of_high)}
    return {"gil.kl_target_high": _target(of_high), "gil.kl_target_low": _target(of_low)}


def _reasons(price: KlPrice, high: Agreement, settings: dict[str, float]) -> str:
    found = f"by the trusted numbers the best of n responses is best at n = {_shown(price.groups[HIGH])} for the "
    found += f"prompts of high score and at {_shown(price.groups[LOW])} for those of low score"
    unknown = math.isnan(high.value.value)
    begins = f"{NO_AGREEMENT} in the {high.num_rows:,} {high.rows}. " * unknown
    if "ppo.kl_target" in settings:
        helps = "can be followed as far in both groups" if price.groups[HIGH].best_n > 1 else "helps in neither group"
        return f"{begins}The reward {helps}, one KL will do: {_text(settings)}; {found}"
    cost = f"One KL for both would cost {price.price.value:.3f} [{price.price.low:.3f}, {price.price.high:.3f}] of them"
    begins = begins or f"{not_trusted(high)}: groups pay; "
    return f"{begins}{_text(settings)}, for {found}. {cost}"


def _target(group: BestOfN) -> float:
    """Nats a response, to two digits."""
    return float(f"{max(group.best_kl, LEAST_TARGET):.2g}")


def _shown(group: BestOfN) -> str:
    most = f", the most there are of {group.num_prompts:,} prompts" if group.best_n == len(group.curve) else ""
    return f"{group.best_n} [{group.best_n_low}, {group.best_n_high}{most}]"


def _text(settings: dict[str, float]) -> str:
    return " ".join(f"{key}={value:g}" for key, value in settings.items())
