"""Tables and pictures of a grid, finished or not: python examples/miniature/analyse.py runs/miniature [RESULTS]

Writes results.csv.gz (one row per run and metric), wins.csv.gz, curves.csv.gz, the tables that tables.py makes of
them, groups.md and the pictures.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from audit import audit_table, stability_table
from cells import GRID, Place, read_grid
from measure import gap_of_scores, gold_curve, measure
from pictures import write_pictures
from tables import collect, markdown, win_rows, write_tables
from tidy import write_csv

from megatron_gil.evaluation.report.runs import Json, Run, read_run
from megatron_gil.jsonl import iter_jsonl

Curves = dict[str, dict[str, dict[int, list[float]]]]
"""method -> metric -> iteration -> a value per seed."""
CURVES = ("policy/kl_sequence", "reward/score_mean", "group/return_variance", "policy/kl_weight", "group/mass_0")


def analyse(output: Path, results: Path, grid: Path = GRID) -> None:
    """Write everything that can be said of the cells that have finished."""
    cells = read_grid(grid)
    seeds = sorted(int(path.name.removeprefix("seed_")) for path in output.glob("seed_*"))
    places = [Place(output=output, seed=seed, cell=cell) for cell in cells.values() for seed in seeds]
    finished = [place for place in places if place.rows.exists()]
    rows = [row for place in finished for row in remeasure(place)]
    replies = {(p.cell.name, p.seed): _read(p.replies) for p in finished if p.replies.exists()}
    runs = {(p.cell.name, p.seed): read_run(p.run_dir) for p in finished if p.cell.command == "ppo"}
    labels = {name: cell.label for name, cell in cells.items()}
    numbers, wins, curves = collect(rows), win_rows(replies), collect_curves(runs)
    results.mkdir(parents=True, exist_ok=True)
    write_csv(results / "results.csv.gz", ("seed", "method", "metric", "value"), rows)
    write_csv(results / "wins.csv.gz", ("seed", "ours", "opponent", "win", "tie", "lose"), wins)
    write_csv(results / "curves.csv.gz", ("method", "metric", "iteration", "seeds", "mean"), _mean_rows(curves))
    write_tables(results, labels)
    of_groups = [audit_table(runs), stability_table(runs, labels)]
    (results / "groups.md").write_text("\n".join(map(markdown, of_groups)), encoding="utf-8")
    write_pictures(results, numbers, replies, curves, labels)


def remeasure(place: Place) -> list[Json]:
    """A finished cell's rows with today's measures, so that a new measure does not ask for a new run."""
    rows = {row["metric"]: row for row in _read(place.rows)}
    for metric, value in measure(place.run_dir, place.replies).items():
        rows[metric] = {"seed": place.seed, "method": place.cell.name, "metric": metric, "value": value}
    return list(rows.values())


def collect_curves(runs: Mapping[tuple[str, int], Run]) -> Curves:
    """Over training: metrics, the gap in score between easy and hard domains, the gold score of samples."""
    curves: Curves = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for (method, _), run in runs.items():
        of_method = curves[method]
        for metric in CURVES:
            for iteration, value in zip(*run.series(metric), strict=True):
                of_method[metric][iteration].append(value)
        for row in run.metrics:
            score_gap = gap_of_scores(row)
            if score_gap is not None:
                of_method["score gap"][row["iteration"]].append(score_gap)
            if "group/mass_1" in row:
                of_method["return gap"][row["iteration"]].append(_return_gap(row))
        iterations = sorted({row["iteration"] for row in run.samples})
        for iteration, value in zip(iterations, gold_curve(run.samples), strict=True):
            of_method["gold"][iteration].append(value)
    return curves


def _return_gap(row: Mapping[str, float]) -> float:
    returns = [value for name, value in row.items() if name.startswith("group/return_") and name[-1].isdigit()]
    return max(returns) - min(returns)


def _mean_rows(curves: Curves) -> list[Json]:
    """Every tenth iteration of each curve, and those of the samples."""
    return [
        {"method": method, "metric": metric, "iteration": i, "seeds": len(values), "mean": sum(values) / len(values)}
        for method, by_metric in curves.items()
        for metric, by_iteration in by_metric.items()
        for i, values in by_iteration.items()
        if i % 10 == 9
    ]


def _read(path: Path) -> list[Json]:
    return [row for _, row in iter_jsonl(path)]


if __name__ == "__main__":
    output = Path(sys.argv[1])
    analyse(output, Path(sys.argv[2]) if len(sys.argv) > 2 else output / "results")
