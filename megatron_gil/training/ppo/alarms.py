"""Warnings about a PPO run while it goes on, each with its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_gil.config import AlarmSection
from megatron_gil.parallel.collectives import gather_objects
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.training.ppo.episodes import Episodes
from megatron_gil.training.ppo.trends import AHEAD, WINDOW
from megatron_gil.types import Metrics

BASELINE = ("policy/entropy", "response/tokens")
"""Metrics of which later values are compared with that of the first iteration."""
KL_DECAY, KL_FLOOR = 0.9, 3.0
"""A KL is compared with its own running mean, which has this decay and counts as at least so many nats a response: at
the start of a run the mean is near 0, and any KL would be a leap."""


@dataclass(frozen=True, slots=True)
class Alarm:
    name: str
    level: float
    """How near the number is to its threshold: 1 there, above 1 beyond it."""
    text: str


class Alarms:
    """Looks at the metrics of each iteration. An alarm is a metric alarm/NAME, and a line when it begins (when it does,
    and when it ends: episodes.py)."""

    def __init__(
        self,
        section: AlarmSection,
        *,
        min_group_mass: float,
        score_range: tuple[float, float] | None,
        truncations: Sequence[str] = (),
    ) -> None:
        """score_range: the least and the largest score of the reward model's own training data; None where that is
        not known. truncations: the settings, such as top_p, that keep the sampler from drawing from the whole
        softmax."""
        self._truncations = truncations
        self._section, self._min_group_mass, self._score_range = section, min_group_mass, score_range
        self._of_training = score_range is not None
        self._baseline: dict[str, float] = {}  # the metrics of BASELINE in the first iteration
        self._kl_means: dict[str, float] = {}  # of the batch and of each group
        self._episodes = Episodes()
        self._lines: list[str] = []

    def out_of_range_fraction(self, scores: Tensor, layout: ParallelLayout) -> float:
        """Share of the global batch's scores outside score_range. Where that is not known, the range of the first
        batch takes its place."""
        # The ranks that share a model copy all give the same scores, which changes no share.
        found = [score for part in gather_objects(scores.tolist(), layout) for score in part]
        finite = [score for score in found if math.isfinite(score)]
        if self._score_range is None and finite:
            self._score_range = min(finite), max(finite)
        low, high = self._score_range or (math.nan, math.nan)
        return sum(not low <= score <= high for score in found) / len(found)

    def check(self, metrics: Metrics, *, warming_up: bool = False) -> dict[str, float]:
        """The metrics alarm/NAME, 1 while the alarm stands and else 0, from the metrics of one iteration.
        warming_up: the classifier is still in its warm-up, so groups that are alike are no reason to warn."""
        if not self._baseline:
            self._baseline = {name: metrics[name] for name in BASELINE}
        alarms = [*self._of_kl(metrics), *self._of_trend(metrics), *self._of_groups(metrics, warming_up)]
        alarms += self._of_responses(metrics)
        self._lines += [f"warning: {a.text}" for a in alarms if self._episodes.begins(a.name, a.level)]
        return {f"alarm/{a.name}": float(self._episodes.stands(a.name)) for a in alarms}

    def take_lines(self) -> list[str]:
        """One for each alarm that began since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def state(self) -> dict[str, Any]:
        return {
            "baseline": self._baseline,
            "kl_means": self._kl_means,
            "score_range": self._score_range,
            "episodes": self._episodes.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._baseline, self._kl_means = state["baseline"], state["kl_means"]
        self._score_range = state["score_range"] and tuple(state["score_range"])
        self._episodes.load_state(state.get("episodes", {}))  # a checkpoint of an older version has none

    def _of_kl(self, metrics: Metrics) -> Iterator[Alarm]:
        section = self._section
        masses = _per_group(metrics, "group/mass_")
        by_group = _per_group(metrics, "policy/kl_group_")
        counting = {f"group_{g}": kl for g, kl in by_group.items() if masses[g] >= self._min_group_mass}
        kls = {"sequence": metrics["policy/kl_sequence"], **counting}
        # A KL that is not finite needs no alarm: the update itself is refused.
        kls = {name: kl for name, kl in kls.items() if math.isfinite(kl)}
        if section.max_kl and kls:
            worst = max(kls, key=lambda name: kls[name])
            text = f"KL {kls[worst]:.3g} nats a response (policy/kl_{worst}) is above alarms.max_kl={section.max_kl:g}"
            yield Alarm("kl", kls[worst] / section.max_kl, text)
        if section.kl_spike and kls:
            recent = {name: max(KL_FLOOR, self._kl_means.get(name, kl)) for name, kl in kls.items()}
            rises = {name: kl / recent[name] for name, kl in kls.items()}
            worst = max(rises, key=lambda name: rises[name])
            text = f"KL {kls[worst]:.3g} nats a response (policy/kl_{worst}) is {rises[worst]:.2g} times the "
            text += f"{recent[worst]:.3g} of late (never counted below {KL_FLOOR:g})"
            yield Alarm("kl_spike", rises[worst] / section.kl_spike, text)
        for name, kl in kls.items():
            self._kl_means[name] = KL_DECAY * self._kl_means.get(name, kl) + (1 - KL_DECAY) * kl

    def _of_trend(self, metrics: Metrics) -> Iterator[Alarm]:
        """Of the batch alone: the KL of a group whose penalty is low by intent goes further, and does no harm by it."""
        if self._section.kl_ahead:
            now, ahead = metrics["policy/kl_sequence"], metrics.get("policy/kl_ahead", math.nan)  # nan: not known yet
            entropy = self._baseline["policy/entropy"] * self._baseline["response/tokens"]
            share = _ratio(ahead, entropy)
            text = f"KL {now:.3g} nats a response will be {ahead:.3g} in {AHEAD} iterations if it goes on as in the "
            text += f"last {WINDOW}: {share:.0%} of the {entropy:.3g} nats of entropy that a response had at first"
            yield Alarm("kl_ahead", share / self._section.kl_ahead, text)

    def _of_groups(self, metrics: Metrics, warming_up: bool) -> Iterator[Alarm]:
        masses = _per_group(metrics, "group/mass_")
        if not masses:
            return
        least = min(masses, key=lambda group: masses[group])
        text = f"group {least} has {masses[least]:.2%} of the batch, below gil.min_group_mass"
        text += f"={self._min_group_mass:g}: it no longer counts"
        vanished = masses[least] < self._min_group_mass
        yield Alarm("group_mass", _ratio(self._min_group_mass, masses[least]), text)
        if self._section.group_information:
            found = metrics["group/information"]
            text = f"the classifier tells {found:.2%} of what it could: its groups are all alike"
            level = 0.0 if vanished or warming_up else _ratio(self._section.group_information, found)
            yield Alarm("group_information", level, text)

    def _of_responses(self, metrics: Metrics) -> Iterator[Alarm]:
        section, baseline = self._section, self._baseline
        if section.sampling_mismatch and self._truncations:
            found = metrics["policy/sampling_mismatch"]
            text = f"the sampler is {found:.2g} nats a token away from the log-probs that PPO uses: "
            text += f"{', '.join(self._truncations)}"
            yield Alarm("sampling_mismatch", found / section.sampling_mismatch, text)
        if section.duplicate_fraction:
            found = metrics["response/duplicate_fraction"]
            text = f"{found:.0%} of the responses are the same as a response to another prompt"
            yield Alarm("duplicates", found / section.duplicate_fraction, text)
        if section.out_of_range_fraction and "reward/out_of_range_fraction" in metrics:  # a function has no such range
            found = metrics["reward/out_of_range_fraction"]
            low, high = self._score_range or (math.nan, math.nan)
            known = "what the reward model was trained on" if self._of_training else "those of the first iteration"
            text = f"{found:.0%} of the scores lie outside [{low:.3g}, {high:.3g}], {known}"
            yield Alarm("score", found / section.out_of_range_fraction, text)
        if section.entropy_fraction:
            first, now = baseline["policy/entropy"], metrics["policy/entropy"]
            text = f"entropy {now:.3g} nats a token, {first:.3g} at first: the policy collapses"
            yield Alarm("entropy", _ratio(section.entropy_fraction * first, now), text)
        if section.length_factor:
            first, now = baseline["response/tokens"], metrics["response/tokens"]
            text = f"responses have {now:.3g} tokens, {first:.3g} at first"
            factor = max(_ratio(now, first), _ratio(first, now))
            yield Alarm("length", factor / section.length_factor, text)


def _ratio(value: float, to: float) -> float:
    """value / to, of numbers that are 0 or more; infinite where `to` is 0 (or, as rounding may leave it, below)."""
    return value / to if to > 0 or math.isnan(to) else math.inf


def _per_group(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
