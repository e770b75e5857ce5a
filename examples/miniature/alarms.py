"""What the alarms caught: python examples/miniature/alarms.py runs/faults [RESULTS], after run.py --grid faults.yaml.

Writes alarms.csv.gz (one row per run and alarm) and alarms.md: recall on injected faults, false alarms on healthy runs,
and how many iterations before the gold score drops each alarm fires.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from cells import GRID, read_grid
from measure import gold_curve
from tables import markdown
from tidy import write_csv

from megatron_gil.evaluation.report.page import Table
from megatron_gil.evaluation.report.runs import Json, Run, read_run

FAULTS = {
    "duplicates": "canned",
    "length": "longer",
    "score": "ppo",
    "kl_ahead": "ppo",
    "kl_spike": "kl_spike",
    "group_mass": "one_group",
    "group_information": "alike",
    "kl": "kl_spike",
    "entropy": "canned",
}
"""Alarm -> the cell whose fault it is for. The last two share one with another."""
HEALTHY = ("ppo_kl", "gil", "gil_floor")
DROP, SMOOTHED, HELD = 0.05, 5, 3
"""How far gold falls below its best so far, in means over so many events of samples around each; for how many."""


def main() -> None:
    output = Path(sys.argv[1])
    results = Path(sys.argv[2]) if len(sys.argv) > 2 else output / "results"
    labels = {name: cell.label for name, cell in read_grid(GRID.with_name("faults.yaml")).items()}
    wanted = [*dict.fromkeys(FAULTS.values()), *HEALTHY]
    finished = [(name, path) for name in wanted for path in sorted(output.glob(f"seed_*/{name}/rows.jsonl"))]
    rows = [row for name, path in finished for row in of_run(name, path.parent / "run")]
    results.mkdir(parents=True, exist_ok=True)
    write_csv(results / "alarms.csv.gz", list(rows[0]), rows)
    shown = [_of_faults(rows, labels), _of_all(rows, labels), _of_gold(rows, labels)]
    (results / "alarms.md").write_text("\n".join(map(markdown, shown)), encoding="utf-8")


def of_run(cell: str, run_dir: Path) -> list[Json]:
    """A row for each alarm that the run has."""
    run = read_run(run_dir)
    raised = {
        name.removeprefix("alarm/"): [row["iteration"] for row in run.metrics if row.get(name)]
        for name in run.names()
        if name.startswith("alarm/")
    }
    seed, gold_drop = int(run_dir.parts[-3].removeprefix("seed_")), drop_iteration(run)
    shared = {"cell": cell, "seed": seed, "iterations": len(run.metrics), "gold_drop": gold_drop}
    return [
        {**shared, "alarm": alarm, "raised": len(found), "first": found[0] if found else None}
        for alarm, found in raised.items()
    ]


def drop_iteration(run: Run) -> int | None:
    """The first iteration with samples from which to the end gold is DROP or more below its best so far; or None."""
    iterations, curve = sorted({row["iteration"] for row in run.samples}), gold_curve(run.samples)
    reach = SMOOTHED // 2
    smooth = [fmean(curve[max(0, i - reach) : i + reach + 1]) for i in range(len(curve))]
    low = [value <= max(smooth[: i + 1]) - DROP for i, value in enumerate(smooth)]
    held = next((i for i, is_low in enumerate(reversed(low)) if not is_low), len(low))
    return iterations[-held] if held >= HELD else None


def _of_faults(rows: Sequence[Json], labels: Mapping[str, str]) -> Table:
    table: list[tuple[str, ...]] = []
    for alarm, cell in FAULTS.items():
        hits, false = _of(rows, alarm, cell), (_false(_of(rows, alarm, healthy)) for healthy in HEALTHY)
        table.append((alarm, labels[cell], _recall(hits), _range(_firsts(hits)), _lead(hits), *false))
    header = ("alarm", "fault", "recall", "first iteration", "lead", *(f"false: {labels[name]}" for name in HEALTHY))
    note = (
        "Recall: runs in which the alarm fired at least once. Lead: iterations from then to the drop of gold, median "
        "[least, most] of the runs with both. False: share of the iterations, and runs, with the alarm."
    )
    return Table(caption="Alarms on injected faults and on healthy runs", header=header, rows=table, note=note)


def _of_all(rows: Sequence[Json], labels: Mapping[str, str]) -> Table:
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    table: list[tuple[str, ...]] = []
    for alarm in FAULTS:
        hits = [_of(rows, alarm, cell) for cell in cells]
        shown = [f"{_recall(found)}, at {median(_firsts(found)):g}" if _firsts(found) else "" for found in hits]
        table.append((alarm, *shown))
    note = "Runs in which each alarm fired, and the iteration at which it first did (median)."
    header = ("alarm", *(labels[cell] for cell in cells))
    return Table(caption="Every alarm on every run", header=header, rows=table, note=note)


def _of_gold(rows: Sequence[Json], labels: Mapping[str, str]) -> Table:
    table: list[tuple[str, ...]] = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        drops = {row["seed"]: row["gold_drop"] for row in rows if row["cell"] == cell}
        found = [drop for drop in drops.values() if drop is not None]
        table.append((labels[cell], f"{len(found)} of {len(drops)}", _range(found)))
    note = (
        f"Gold of 64 training samples every fifth iteration, mean of {SMOOTHED} events; it has dropped where it is "
        f"{DROP} or more below its best so far and stays there to the end, for {HELD} events or more."
    )
    return Table(caption="Where gold drops", header=("run", "drops", "iteration"), rows=table, note=note)


def _of(rows: Sequence[Json], alarm: str, cell: str) -> list[Json]:
    return [row for row in rows if (row["alarm"], row["cell"]) == (alarm, cell)]


def _recall(hits: Sequence[Json]) -> str:
    return f"{len(_firsts(hits))} of {len(hits)}"


def _firsts(hits: Iterable[Json]) -> list[int]:
    return [row["first"] for row in hits if row["first"] is not None]


def _lead(hits: Sequence[Json]) -> str:
    leads = [h["gold_drop"] - h["first"] for h in hits if h["gold_drop"] is not None and h["first"] is not None]
    if not any(h["gold_drop"] is not None for h in hits):
        return "no drop"
    return f"{_range(leads, '+')} ({len(leads)})"


def _range(values: Sequence[int], sign: str = "") -> str:
    return f"{median(values):{sign}g} [{min(values):{sign}g}, {max(values):{sign}g}]" if values else ""


def _false(rows: Sequence[Json]) -> str:
    if not rows:
        return ""
    share = sum(row["raised"] for row in rows) / sum(row["iterations"] for row in rows)
    return f"{share:.1%}, {len(_firsts(rows))} of {len(rows)}"


if __name__ == "__main__":
    main()
