"""An audit as one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_gil.evaluation.audit.measure import Audit
from megatron_gil.evaluation.audit.rows import AuditedRows, SampledResponse, likeliest
from megatron_gil.evaluation.audit.tables import (
    groups_table,
    labels_table,
    reach_table,
    title,
    trusted_table,
    words_table,
)
from megatron_gil.evaluation.quality_tables import quality_table, sentences
from megatron_gil.evaluation.report.figures import PARTS_PALETTE, colors, curve_grid, score_distributions, to_svg
from megatron_gil.evaluation.report.page import (
    PageSection,
    Picture,
    definitions,
    grid,
    page,
    paragraph,
    picture,
    samples_table,
    table,
)
from megatron_gil.evaluation.report.quality_figures import quality_picture
from megatron_gil.evaluation.report.reach_figure import reach_picture
from megatron_gil.evaluation.reward_quality import divide

MAX_CHARACTERS = 700
"""Of a prompt or a response that is shown: the end of the first, the start of the second. All of it is in the numbers'
file."""
CURVES: Mapping[str, str] = {
    "reward/score_mean_group_{}": "score per group",
    "group/mass_{}": "mass of the group",
    "group/return_variance": "variance of returns between groups",
    "group/information": "information of the groups about the row",
}
TERMS: Mapping[str, str] = {
    "group": "Which responses go together, as the classifier of a PPO-GIL run infers it with the policy at rest, or as "
    "the rows say (gil.groups=known). A held-out row is in the group of the policy's own responses to its prompt, or "
    "of its own (audit.group_by=rows).",
    "kappa": "Agreement, beyond chance, of the groups of two responses to one prompt: 1 where groups are those of "
    "prompts, 0 where they tell responses apart and not prompts.",
    "high, low": "The groups whose mean score, rows weighted by their probability, is highest and lowest, among those "
    "with at least gil.min_group_mass. "
    "PPO-GIL takes the KL penalty off a response by as much as it is not in the high group.",
    "agreement": "Spearman's correlation of score and trusted number: 1 is full, 0 none.",
    "ECE, T": "Of pairs; they take the difference of two scores for log-odds, as a reward model's is trained "
    "to be; that of a reward.function need not be.",
    "information": "Mutual information of group and row, as a share of the most that it could be; near 0 the groups "
    "are all alike.",
}


def audit_page(found: Audit, rows: AuditedRows, training: Sequence[Mapping[str, float]], *, name: str) -> str:
    """training: metrics of each iteration in which the classifier learned. name: of the audit."""
    color = colors(rows.groups, PARTS_PALETTE)
    sections = [
        PageSection(title="Groups", body=[table(groups_table(found, swatch=color))]),
        PageSection(title="Reward by group", body=[*_trusted(found), *_quality(found, rows, color)]),
        PageSection(title="How far the reward can be followed", body=_reach(found)),
        PageSection(title="What is in the groups", body=_content(found, rows, color)),
        PageSection(title="Responses that the classifier is surest of", body=_surest(found)),
        PageSection(title="While the classifier learned", body=_curves(training, rows.groups, color)),
        PageSection(title="Terms", body=[definitions(TERMS)]),
    ]
    return page(f"Audit {name}", found.advice.line, sections)


def _trusted(found: Audit) -> list[str]:
    return [table(trusted_table(found))] if found.trusted else []


def _quality(found: Audit, rows: AuditedRows, color: Mapping[str, str]) -> list[str]:
    if found.quality is None:
        return []
    kept = [row.pair for row in rows.pairs if not row.pair.is_identical]
    parts = divide(kept, [pair.group or "" for pair in kept])
    parts = {name: parts[name] for name in rows.groups if name in parts}
    drawn = quality_picture(
        found.quality.overall.bins,
        {name: [pair.margin for pair in part] for name, part in parts.items()},
        {name: part.bins for name, part in found.quality.slices["group"].items()},
        color=color,
    )
    caption = "How sure the reward is of its choice against how often it is right, and its margins, by group."
    said = [paragraph(sentence) for sentence in sentences(found.quality)]
    return [table(quality_table(found.quality)), picture(Picture(svg=to_svg(drawn), caption=caption)), *said]


def _reach(found: Audit) -> list[str]:
    if found.reach is None:
        return []
    drawn = reach_picture(found.reach.groups, color=colors(tuple(found.reach.groups)))
    caption = "Trusted number of the response that scores highest of n, for prompts of high and of low mean "
    caption += (
        "score: what an optimised policy would gain, without training one. Ring: where it is highest. Band: 95 %, "
    )
    caption += "prompts resampled."
    return [picture(Picture(svg=to_svg(drawn), caption=caption)), table(reach_table(found.reach))]


def _content(found: Audit, rows: AuditedRows, color: Mapping[str, str]) -> list[str]:
    scores: dict[str, list[float]] = {name: [] for name in rows.groups}
    for row in rows.responses:
        scores[rows.groups[likeliest(row.probs)]].append(row.score)
    drawn = score_distributions({name: part for name, part in scores.items() if part}, color=color)
    caption = "Scores of the policy's responses; dashed: the normal distribution of the same mean and spread."
    labels = labels_table(found)
    return [
        picture(Picture(svg=to_svg(drawn), caption=caption)),
        table(words_table(found)),
        *([table(labels)] if labels.rows else []),
    ]


def _surest(found: Audit) -> list[str]:
    body: list[str] = []
    for index, group in enumerate(found.groups):
        if group.surest:
            shown = [(_end(row.prompt), [[(_start(row.response), _badges(row, index))]]) for row in group.surest]
            body.append(samples_table([f"response, {title(group.name, found)}"], shown))
    return body


def _badges(row: SampledResponse, index: int) -> list[str]:
    label = [] if row.label is None else [row.label]
    return [f"score {row.score:.2f}", f"p {row.probs[index]:.2f}", *label]


def _curves(training: Sequence[Mapping[str, float]], groups: Sequence[str], color: Mapping[str, str]) -> list[str]:
    if len(training) < 2:
        return []
    steps, panels = list(range(len(training))), []
    for pattern, label in CURVES.items():
        names = {group: pattern.format(i) for i, group in enumerate(groups)} if "{}" in pattern else {label: pattern}
        lines = {line: (steps, [row[name] for row in training]) for line, name in names.items()}
        own = color if "{}" in pattern else {label: "#1f2328"}
        drawn = curve_grid({label: lines}, color=own, legend=False)
        panels.append(Picture(svg=to_svg(drawn), caption=label, is_panel=True))
    note = "Where these lines still rise at the end, raise audit.iterations."
    return grid(panels, color, note)


def _end(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"... {text[-MAX_CHARACTERS:]}"


def _start(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..."
