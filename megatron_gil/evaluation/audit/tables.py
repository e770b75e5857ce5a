"""The tables of an audit, a row for each group."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_gil.evaluation.audit.advice import shown
from megatron_gil.evaluation.audit.correlation import Correlation
from megatron_gil.evaluation.audit.measure import Audit, Group
from megatron_gil.evaluation.best_of_n import KlPrice
from megatron_gil.evaluation.report.page import Table
from megatron_gil.evaluation.tables import percent_interval

HINTS: Mapping[str, str] = {
    "mass": "mean probability of the group over the policy's responses",
    "score": "mean score of the group's responses",
    "tokens": "mean length of the group's responses",
    "score ~ length": "Spearman's correlation of score and length in tokens",
    "duplicates, %": "share of responses that answer another prompt too, letter for letter",
    "accuracy, % [95 %]": "share of pairs whose chosen response scores higher, ties half",
    "Spearman [95 %]": "rank correlation of score and trusted number",
}


def groups_table(found: Audit, *, narrow: bool = False, swatch: Mapping[str, str] | None = None) -> Table:
    """narrow: for a console. swatch: colour of each group's name."""
    columns = {name: [_cell(name, group, found) for group in found.groups] for name in _columns(found, narrow)}
    names = [title(group.name, found) for group in found.groups]
    rows = list(zip(names, *columns.values(), strict=True))
    note = "Score to duplicates: of the policy's responses that are likeliest in the group."
    if found.prompt_kappa is not None and not math.isnan(found.prompt_kappa.value):
        note += f" Two responses to one prompt share a group with kappa {shown(found.prompt_kappa)}."
    return Table(
        caption="groups",
        header=("", *columns),
        rows=rows,
        note="" if narrow else note,
        hints=HINTS,
        swatch={title(name, found): color for name, color in (swatch or {}).items()},
    )


def title(group: str, found: Audit) -> str:
    """The group's name, and whether it is the high or the low one."""
    if found.low is None:
        return group
    return f"{group}{' (high)' * (group == found.high)}{' (low)' * (group == found.low)}"


def _columns(found: Audit, narrow: bool) -> list[str]:
    names = ["mass", "score"] if narrow else ["mass", "responses", "score", "tokens", "score ~ length", "duplicates, %"]
    if found.quality:
        names += ["pairs", "accuracy, % [95 %]"]
    if found.trusted:
        names += ["Spearman [95 %]"]
    return names


def _cell(column: str, group: Group, found: Audit) -> str:
    quality, trusted = found.quality_of(group.name), found.trusted_by_group.get(group.name)
    match column:
        case "mass":
            return f"{group.mass:.2f}"
        case "responses":
            return f"{group.num_responses:,}"
        case "score":
            return _number(group.score_mean, "z.2f")
        case "tokens":
            return _number(group.tokens_mean, ".0f")
        case "score ~ length":
            return _number(group.score_length, "+z.2f")
        case "duplicates, %":
            return _number(100 * group.duplicate_fraction, ".0f")
        case "pairs":
            return f"{quality.num_pairs:,}" if quality else "0"
        case "accuracy, % [95 %]":
            return percent_interval(quality.accuracy) if quality else "-"
    return shown(trusted.spearman) if trusted else "-"


def trusted_table(found: Audit) -> Table:
    """All rows, then each group; no rows where there are none."""
    parts = {"all": found.trusted, **{title(name, found): part for name, part in found.trusted_by_group.items()}}
    rows = [_trusted_cells(name, part) for name, part in parts.items() if part is not None]
    return Table(
        caption="scores against trusted numbers",
        header=("", "rows", "prompts", "Spearman [95 %]", "Pearson [95 %]"),
        rows=rows,
        note="[ ]: prompts resampled with all their rows. - : fewer than three rows, or numbers that do not vary.",
    )


def _trusted_cells(name: str, found: Correlation) -> tuple[str, ...]:
    counts = f"{found.num_rows:,}", f"{found.num_prompts:,}"
    return (name, *counts, shown(found.spearman), shown(found.pearson))


SHOWN_N = (1, 2, 4, 8, 16, 32, 64)


def reach_table(reach: KlPrice, *, narrow: bool = False) -> Table:
    """narrow: for a console."""
    numbers = [n for n in SHOWN_N if n <= len(next(iter(reach.groups.values())).curve)]
    rows = [
        (
            f"prompts of {name}",
            f"{group.num_prompts:,}",
            *(f"{group.curve[n - 1].value:.2f}" if narrow else shown(group.curve[n - 1]) for n in numbers),
            f"{group.best_n} [{group.best_n_low}, {group.best_n_high}]",
            f"{group.best_kl:.2f}",
        )
        for name, group in reach.groups.items()
    ]
    price = reach.price
    note = f"One KL for all, at n = {reach.shared_n}, costs {price.value:.3f} [{price.low:.3f}, {price.high:.3f}]. "
    note += "KL: log n - (n - 1) / n, nats a response, at the best n."
    header = ("", "prompts", *(f"{'n = ' * (not narrow or n == 1)}{n}" for n in numbers), "best n [95 %]", "KL")
    return Table(caption="trusted number of the best of n responses", header=header, rows=rows, note=note)


def words_table(found: Audit) -> Table:
    rows = [
        (
            title(group.name, found),
            ", ".join(f"{w.word} ({_percent(w.here)} of {_percent(w.everywhere)})" for w in group.words),
        )
        for group in found.groups
        if group.words
    ]
    note = (
        "The words whose share of the group's words exceeds their share of all words the most: a (3.1 of 2.0) is 3.1 "
    )
    note += "% of the group's words and 2.0 % of all."
    return Table(caption="", header=("", "typical words of the responses"), rows=rows, note=note, is_text=True)


def labels_table(found: Audit) -> Table:
    """How many responses to prompts of each known label are in each group; no rows where there are no labels."""
    labels = sorted({label for group in found.groups for label in group.labels})
    totals = {label: sum(group.labels.get(label, 0) for group in found.groups) for label in labels}
    rows = [
        (
            label,
            f"{totals[label]:,}",
            *(f"{100 * group.labels.get(label, 0) / totals[label]:.0f} %" for group in found.groups),
        )
        for label in labels
    ]
    header = ("label", "responses", *(title(group.name, found) for group in found.groups))
    return Table(caption="known labels of the prompts, by group", header=header, rows=rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
