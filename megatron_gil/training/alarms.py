"""Warnings with numbers: what a person would want to be told while the run still goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_gil.config import AlarmSection
from megatron_gil.parallel.collectives import gather_objects
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.types import Metrics, Rollout

BASELINE = ("reward/score_mean", "reward/score_std", "policy/entropy", "response/tokens")
"""Metrics whose values in the first iteration are what later ones are held against."""


@dataclass(frozen=True, slots=True)
class Alarm:
    name: str
    raised: bool
    text: str


class Alarms:
    """Looks at the metrics of each iteration. An alarm is a metric alarm/NAME, and a line when it begins."""

    def __init__(self, section: AlarmSection, *, min_group_mass: float) -> None:
        self._section, self._min_group_mass = section, min_group_mass
        self.baseline: dict[str, float] = {}
        """What a checkpoint must hold: the metrics of BASELINE in the first iteration."""
        self._raised: frozenset[str] = frozenset()
        self._lines: list[str] = []

    def check(self, metrics: Metrics) -> dict[str, float]:
        """alarm/NAME -> 0 or 1, for all that these metrics of an iteration tell."""
        if not self.baseline:
            self.baseline = {name: metrics[name] for name in BASELINE if name in metrics}
        alarms = list(self._look(metrics))
        self._lines += [f"warning: {a.text}" for a in alarms if a.raised and a.name not in self._raised]
        self._raised = frozenset(a.name for a in alarms if a.raised)
        return {f"alarm/{a.name}": float(a.raised) for a in alarms}

    def take_lines(self) -> list[str]:
        """One for each alarm that began since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def _look(self, metrics: Metrics) -> Iterator[Alarm]:
        section = self._section
        kls = _per_group(metrics, "policy/kl_")  # sequence, group_0, group_1, ...
        kls.pop("weight", None)
        if section.max_kl and kls:
            worst = max(kls, key=lambda name: kls[name])
            text = f"KL {kls[worst]:.3g} nats a reply (policy/kl_{worst}) is above alarms.max_kl={section.max_kl:g}"
            yield Alarm("kl", kls[worst] > section.max_kl, text)
        masses = _per_group(metrics, "group/mass_")
        if masses:
            least = min(masses, key=lambda group: masses[group])
            text = f"group {least} has {masses[least]:.2%} of the batch, below gil.min_group_mass"
            text += f"={self._min_group_mass:g}: it no longer counts"
            yield Alarm("group_mass", masses[least] < self._min_group_mass, text)
        duplicates = metrics.get("response/duplicate_fraction")
        if section.duplicate_fraction and duplicates is not None:
            text = f"{duplicates:.0%} of the replies are the same as a reply to another prompt"
            yield Alarm("duplicates", duplicates > section.duplicate_fraction, text)
        yield from self._drifts(metrics)

    def _drifts(self, metrics: Metrics) -> Iterator[Alarm]:
        section, baseline = self._section, self.baseline
        if section.score_deviations:
            first, spread, now = (
                baseline["reward/score_mean"],
                baseline["reward/score_std"],
                metrics["reward/score_mean"],
            )
            text = f"score {now:.3g} is more than {section.score_deviations:g} standard deviations ({spread:.3g}) from "
            text += f"the first iteration's {first:.3g}: the reward model may not know such replies"
            yield Alarm("score", abs(now - first) > section.score_deviations * spread, text)
        if section.entropy_fraction:
            first, now = baseline["policy/entropy"], metrics["policy/entropy"]
            text = f"entropy {now:.3g} nats a token, {first:.3g} at first: the policy collapses"
            yield Alarm("entropy", now < section.entropy_fraction * first, text)
        if section.length_factor:
            first, now = baseline["response/tokens"], metrics["response/tokens"]
            text = f"replies have {now:.0f} tokens, {first:.0f} at first"
            yield Alarm("length", not first / section.length_factor <= now <= first * section.length_factor, text)


def duplicate_fraction(rollout: Rollout, layout: ParallelLayout) -> float:
    """Share of the global batch's replies that equal, token for token, a reply to another prompt."""
    ends = zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    replies = [hash(tuple(row[start:end])) for row, (start, end) in zip(rollout.tokens.tolist(), ends, strict=True)]
    mine = list(zip(replies, rollout.row_ids.tolist(), strict=True))
    pairs = [pair for part in gather_objects(mine, layout) for pair in part]  # of tp and pp ranks too: the same ones
    prompts: dict[int, set[int]] = {}
    for reply, row_id in pairs:
        prompts.setdefault(reply, set()).add(row_id)
    return sum(len(prompts[reply]) > 1 for reply, _ in pairs) / len(pairs)


def _per_group(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
