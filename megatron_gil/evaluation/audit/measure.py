"""The groups of a planned run, and how far the reward is to be trusted in each. Pure: rows in, numbers out."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_gil.evaluation.audit.advice import Advice, Agreement, advise, advise_without_groups, advise_without_scores
from megatron_gil.evaluation.audit.correlation import Correlation, correlate, spearman
from megatron_gil.evaluation.audit.rows import AuditedRows, SampledResponse, TrustedRow, likeliest
from megatron_gil.evaluation.audit.targets import advise_targets, agreement_on_high, price_of, split_prompts
from megatron_gil.evaluation.audit.words import TypicalWord, typical_words
from megatron_gil.evaluation.best_of_n import KlPrice
from megatron_gil.evaluation.cluster_bootstrap import DRAWS, expanded_interval, number_clusters, resampled_sums
from megatron_gil.evaluation.reward_quality import Quality, RewardQuality, reward_quality
from megatron_gil.evaluation.statistics import Estimate

NUM_WORDS, NUM_SUREST = 10, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Of the policy's responses: those that are likelier in this group than in any other; NaN where there are none."""

    name: str
    mass: float
    """Mean over all responses of the probability of this group."""
    mean_score: float
    """Of all responses, each weighted by its probability of this group: by this the run knows which group is high."""
    num_responses: int
    score_mean: float
    tokens_mean: float
    score_length: float
    """Spearman's correlation of a response's score and its length in tokens."""
    duplicate_fraction: float
    """Share of responses that equal, letter for letter, a response to another prompt."""
    words: tuple[TypicalWord, ...]
    labels: Mapping[str, int]
    """Known label -> its responses here; responses without one are not counted."""
    surest: tuple[SampledResponse, ...]
    """The responses that are likeliest in this group, of different prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    groups: tuple[Group, ...]
    high: str
    """The group whose score is highest; and of those with enough mass ..."""
    low: str | None
    """... the one whose score is lowest; None where only one has enough mass, or all responses have one score."""
    quality: RewardQuality | None
    """On the pairs; its slices by group are those of the inferred groups. None without pairs."""
    trusted: Correlation | None
    """On all trusted rows; None without."""
    trusted_by_group: Mapping[str, Correlation]
    prompt_kappa: Estimate | None
    """How far the groups are groups of prompts: agreement beyond chance (Scott's pi) of two responses to one prompt.
    1: both always are in one group; 0: no more often than by chance. NaN where all are in one group; None where no
    prompt was read twice."""
    reach: KlPrice | None
    """How far the reward can be followed for prompts of high and of low score; None without several trusted responses
    to a prompt."""
    on_high: Agreement | None
    """Where the score is high, which the advice rests on: of the prompts of high score where `reach` is there, else of
    the trusted rows in the high group. None without any."""
    advice: Advice

    def quality_of(self, group: str) -> Quality | None:
        """On the pairs of a group; None where it has none."""
        return self.quality.slices["group"].get(group) if self.quality else None


def audit_rows(rows: AuditedRows, *, min_group_mass: float) -> Audit:
    """ConfigError where the pairs are no pairs of two different responses.

    min_group_mass: a group with less than this share of the responses is neither high nor low (gil.min_group_mass).
    """
    groups = tuple(_measure(rows, index) for index in range(len(rows.groups)))
    counting = [g for g in groups if g.mass >= min_group_mass] or [max(groups, key=lambda g: g.mass)]
    differ = len({row.score for row in rows.responses}) > 1
    by_score = [g.name for g in sorted(counting, key=lambda g: -g.mean_score)]
    high, low = by_score[0], by_score[-1] if len(by_score) > 1 and differ else None
    pairs = sorted((row.pair for row in rows.pairs), key=lambda pair: rows.groups.index(pair.group or ""))
    quality = reward_quality(pairs) if pairs else None
    by_group = {name: _correlate([r for r in rows.trusted if r.group == name]) for name in rows.groups}
    found = {name: part for name, part in by_group.items() if part is not None}

    readings = [(row.pair.prompt, row.views) for row in rows.pairs] + [(r.prompt, r.views) for r in rows.trusted]
    kappa, split = prompt_kappa(readings), split_prompts(rows.trusted)
    reach = price_of(split) if split else None
    on_high = agreement_on_high(split) if split else _agreement(found.get(high))

    def advice() -> Advice:
        if reach and on_high:
            return advise_targets(reach, on_high)
        if not differ:
            return advise_without_scores()
        if low is None:
            return advise_without_groups(high)
        return advise(on_high, kappa)

    return Audit(
        groups=groups,
        high=high,
        low=low,
        quality=quality,
        trusted=_correlate(rows.trusted),
        trusted_by_group=found,
        prompt_kappa=kappa,
        reach=reach,
        on_high=on_high,
        advice=advice(),
    )


def _agreement(found: Correlation | None) -> Agreement | None:
    return None if found is None else Agreement(value=found.spearman, num_rows=found.num_rows)


def _measure(rows: AuditedRows, index: int) -> Group:
    probs = np.array([row.probs[index] for row in rows.responses])
    scores = np.array([row.score for row in rows.responses])
    here = [row for row in rows.responses if likeliest(row.probs) == index]
    repeated, texts = _repeated(rows.responses), [row.response for row in here]
    own_scores, tokens = [row.score for row in here], [row.num_tokens for row in here]
    labels = Counter(row.label for row in here if row.label is not None)
    return Group(
        name=rows.groups[index],
        mass=float(probs.mean()),
        mean_score=float(probs @ scores / probs.sum()) if probs.sum() > 0 else math.nan,
        num_responses=len(here),
        score_mean=_mean(own_scores),
        tokens_mean=_mean(tokens),
        score_length=spearman(own_scores, tokens) if here else math.nan,
        duplicate_fraction=_mean([text in repeated for text in texts]),
        words=tuple(typical_words(texts, [row.response for row in rows.responses], NUM_WORDS)),
        labels=dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))),
        surest=_surest(here, index),
    )


def _repeated(responses: Sequence[SampledResponse]) -> set[str]:
    """The texts that answer more than one prompt."""
    prompts: dict[str, set[str]] = defaultdict(set)
    for row in responses:
        prompts[row.response].add(row.prompt)
    return {text for text, found in prompts.items() if len(found) > 1}


def _surest(here: Sequence[SampledResponse], index: int) -> tuple[SampledResponse, ...]:
    of_prompt: dict[str, SampledResponse] = {}
    for row in sorted(here, key=lambda row: -row.probs[index]):
        of_prompt.setdefault(row.prompt, row)
    return tuple(of_prompt.values())[:NUM_SUREST]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _correlate(rows: Sequence[TrustedRow]) -> Correlation | None:
    if not rows:
        return None
    return correlate([r.score for r in rows], [r.trusted for r in rows], [r.prompt for r in rows])


def prompt_kappa(views: Sequence[tuple[str, tuple[str, ...]]], *, draws: int = DRAWS, seed: int = 0) -> Estimate | None:
    """Scott's pi of two readings of a prompt, of (prompt, its readings); with its interval, prompts resampled. None
    where there are no two readings of any."""
    twice = [(prompt, found) for prompt, found in views if len(found) == 2]
    if not twice:
        return None
    names = sorted({name for _, found in twice for name in found})
    places = np.array([[names.index(name) for name in found] for _, found in twice])
    columns = {"same": (places[:, 0] == places[:, 1]).astype(float), "counts": np.eye(len(names))[places].sum(1)}
    clusters = number_clusters([prompt for prompt, _ in twice])
    value = _kappa(**{name: column.sum(0) for name, column in columns.items()})
    resampled = _kappa(**resampled_sums(clusters, columns, draws=draws, seed=seed))
    return expanded_interval(float(value), resampled, int(clusters.max()) + 1)


def _kappa(same: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """same [...]: pairs whose two responses are in one group. counts [..., groups]: responses in each."""
    total = counts.sum(-1)
    expected = ((counts / total[..., None]) ** 2).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected < 1, (2 * same / total - expected) / (1 - expected), np.nan)
