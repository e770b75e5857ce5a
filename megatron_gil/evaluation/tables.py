"""The tables of an evaluation: judge x task x opponent, what swayed each judge, and how far judges agree."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_gil.evaluation.agreement import PairAgreement, RaterAgreement, agreements
from megatron_gil.evaluation.bias import LengthBias, PositionBias, length_bias, position_bias
from megatron_gil.evaluation.comparisons import Judgment
from megatron_gil.evaluation.report.page import Table
from megatron_gil.evaluation.statistics import Estimate
from megatron_gil.evaluation.winrate import WinRate, p_value, percent, signed_percent, win_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One policy against one opponent on one task, by one judge."""

    judge: str
    task: str
    policy: str
    opponent: str
    rate: WinRate
    position: PositionBias | None
    length: LengthBias | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    cells: Sequence[Cell]
    pairs: Sequence[PairAgreement]
    raters: Sequence[RaterAgreement]


def summarise(judgments: Sequence[Judgment]) -> Summary:
    """A cell for each judge, task, policy and opponent, in the order in which they appear."""
    found: dict[tuple[str, str, str, str], list[Judgment]] = {}
    for j in judgments:
        found.setdefault((j.judge, j.task, j.policy, j.opponent), []).append(j)
    cells = [
        Cell(
            judge=judge,
            task=task,
            policy=policy,
            opponent=opponent,
            rate=win_rate(group),
            position=position_bias(group),
            length=length_bias(group),
        )
        for (judge, task, policy, opponent), group in found.items()
    ]
    pairs, raters = agreements(judgments)
    return Summary(cells=cells, pairs=pairs, raters=raters)


# --- as text


def text_tables(summary: Summary) -> list[Table]:
    """Those that have rows. Names that are the same in every row stand in the caption and not in columns."""
    tables = [_win_table(summary.cells), _bias_table(summary.cells), _length_table(summary.cells), _agreement(summary)]
    return [table for table in tables if table.rows]


def console_tables(summary: Summary) -> list[Table]:
    """Narrow ones: as above for one policy, task and judge. Of several, the win rates of each and the agreement."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in summary.cells:
        groups.setdefault((cell.policy, cell.task, cell.judge), []).append(cell)
    if len(groups) == 1:
        return text_tables(summary)
    *first, last = map(_win_table, groups.values())
    one_note = [replace(table, note="") for table in first]
    return [table for table in (*one_note, last, _agreement(summary)) if table.rows]


def _win_table(cells: Sequence[Cell]) -> Table:
    names, shared = _names(cells)
    counts = {"refused": [c.rate.refused for c in cells], "unanswered": [c.rate.unanswered for c in cells]}
    counts = {name: values for name, values in counts.items() if any(values)}
    rows = [
        (
            *name,
            str(cell.rate.num_prompts),
            *(percent(part.value) for part in (cell.rate.win, cell.rate.tie, cell.rate.lose)),
            signed_percent(cell.rate.margin),
            p_value(cell.rate.sign_test),
            *(str(values[i]) for values in counts.values()),
        )
        for i, (name, cell) in enumerate(zip(names.rows, cells, strict=True))
    ]
    note = "Shares of prompts; a prompt counts once. [ ]: 95 % bootstrap interval over prompts. p: exact sign test."
    if counts:
        note += " Judgments refused or unanswered are in no share."
    header = (*names.header, "prompts", "win %", "tie %", "lose %", "win - lose, % [95 %]", "p", *counts)
    return Table(caption=f"win / tie / lose{shared}", header=header, rows=rows, note=note)


def _bias_table(cells: Sequence[Cell]) -> Table:
    names, shared = _names(cells)
    rows = [
        (
            *name,
            percent_interval(position.first),
            p_value(position.sign_test),
            percent(position.consistent.value),
        )
        for name, cell in zip(names.rows, cells, strict=True)
        if (position := cell.position) is not None
    ]
    note = "first wins: share of the verdicts that are no tie won by the response shown first (50 without a bias); p: "
    note += "exact sign test. consistent: share of comparisons with the same verdict in both orders."
    header = (*names.header, "first wins, % [95 %]", "p", "consistent %")
    return Table(caption=f"position{shared}", header=header, rows=rows, note=note)


def _length_table(cells: Sequence[Cell]) -> Table:
    names, shared = _names(cells)
    rows = [
        (
            *name,
            f"{length.difference:+.0f}",
            percent(length.win_rate.value),
            percent_interval(length.controlled),
            *(percent(part.win_rate.value) for part in (length.bins[0], length.bins[-1])),
        )
        for name, cell in zip(names.rows, cells, strict=True)
        if (length := cell.length) is not None
    ]
    note = "win: wins and half of the ties. longer by: mean characters more than the opponent's. equal length: by a "
    note += "logistic fit (Dubois et al. 2024). shortest, longest: win % of the fifth where we are so against them."
    header = (*names.header, "longer by", "win %", "equal length, % [95 %]", "shortest", "longest")
    return Table(caption=f"length{shared}", header=header, rows=rows, note=note)


def _agreement(summary: Summary) -> Table:
    rows = [
        (f"{a.first} and {a.second}", str(a.num_items), percent(a.agreed.value), "Cohen", _plain_interval(a.kappa))
        for a in summary.pairs
    ]
    rows += [
        (f"{a.judge}: {a.num_raters} raters", str(a.num_items), "", "Fleiss", _plain_interval(a.kappa))
        for a in summary.raters
    ]
    note = (
        "On comparisons that both judged. kappa: agreement beyond chance, 1 at most. A judge of several raters stands "
    )
    note += "for their majority, a tie where there is none."
    header = ("who", "comparisons", "agreed %", "kappa", "value [95 %]")
    return Table(caption="agreement", header=header, rows=rows, note=note)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def _names(cells: Sequence[Cell]) -> tuple[_Names, str]:
    """The columns that tell the cells apart, and what they have in common, in words."""
    fields = [f for f in ("judge", "task", "policy") if len({getattr(c, f) for c in cells}) > 1] + ["opponent"]
    common = {f: getattr(cells[0], f) for f in ("policy", "task", "judge") if f not in fields} if cells else {}
    words = {"policy": " of {}", "task": " on {}", "judge": " by {}"}
    shared = "".join(words[f].format(value) for f, value in common.items() if value)
    return _Names(header=fields, rows=[[getattr(c, f) for f in fields] for c in cells]), shared


def percent_interval(share: Estimate) -> str:
    if math.isnan(share.value):
        return "-"
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _plain_interval(value: Estimate) -> str:
    return "-" if math.isnan(value.value) else f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


# --- as files


def as_markdown(summary: Summary, picture: str) -> str:
    """picture: the name of the file that holds it."""
    parts = [f"![win / tie / lose]({picture})\n"]
    parts += [markdown_table(table) for table in text_tables(summary)]
    return "\n".join(parts)


def markdown_table(table: Table) -> str:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    body = "\n".join("| " + " | ".join(_markdown_cell(cell) for cell in line) + " |" for line in lines)
    return f"**{_markdown_cell(table.caption)}**\n\n{body}\n\n{table.note}\n"


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


def as_csv(summary: Summary) -> str:
    """A row per cell, every number of it but the length bins in a column of its own; empty where there is none."""
    names = [{"judge": c.judge, "task": c.task, "ours": c.policy, "opponent": c.opponent} for c in summary.cells]
    rows = [name | _flat(_numbers(cell)) for name, cell in zip(names, summary.cells, strict=True)]
    header = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(summary: Summary) -> dict[str, Any]:
    """{"tables": [{"judge", "task", "ours", "opponents": {name: numbers}}], "agreement", "raters"}; null where there is
    no number."""
    tables: dict[tuple[str, str, str], dict[str, Any]] = {}
    for cell in summary.cells:
        tables.setdefault((cell.judge, cell.task, cell.policy), {})[cell.opponent] = _numbers(cell)
    return {
        "tables": [
            {"judge": judge, "task": task, "ours": policy, "opponents": opponents}
            for (judge, task, policy), opponents in tables.items()
        ],
        "agreement": [finite(asdict(pair)) for pair in summary.pairs],
        "raters": [finite(asdict(found)) for found in summary.raters],
    }


def _numbers(cell: Cell) -> dict[str, Any]:
    parts = {"position": cell.position, "length": cell.length}
    return finite(asdict(cell.rate) | {name: asdict(part) for name, part in parts.items() if part is not None})


def finite(value: Any) -> Any:
    """The same with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(found: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Names of parts joined by underscores; an estimate's value bears the estimate's own name."""
    flat: dict[str, Any] = {}
    for key, value in found.items():
        name = prefix.rstrip("_") if key == "value" else f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}_")
        elif not isinstance(value, list):
            flat[name] = value
    return flat
