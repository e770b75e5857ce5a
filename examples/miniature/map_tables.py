"""Tables and picture of the map, from its kept numbers: python examples/miniature/map_tables.py [RESULTS]

map.csv.gz, and new.csv.gz and unseen.csv.gz where those worlds have run, hold a row per world, seed, method and metric;
map.md and map.png are written beside them.
"""

from __future__ import annotations

import csv
import gzip
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation, fmean, linear_regression
from typing import TYPE_CHECKING

from cells import GRID
from tables import difference_cell, markdown, mean_cell
from tidy import write_csv

from megatron_gil.demo.domains import HELDOUT_DOMAIN
from megatron_gil.evaluation.report.figures import PALETTE, styled, to_png
from megatron_gil.evaluation.report.page import Table
from megatron_gil.evaluation.report.runs import Json
from megatron_gil.evaluation.statistics import t_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = GRID.parent / "results" / "map"
SETS = ("map", "new", "unseen")
"""Of worlds: those that made the prediction, those that tested it, those that tested an audit's advice."""
HEADER = ("world", "seed", "method", "cell", "metric", "value")
OPPONENT, PUBLISHED, TARGETS, REACH = "ppo", "gil", "targets", "best_of_n"
PRICE = "price"
KEPT = ("gold", "gold_worst", f"gold_{HELDOUT_DOMAIN}", "proxy", "kl", "kl_high", "kl_low", "distinct_hard", "auc_easy")
"""Metrics of a method."""
GAINS = {"gold": "gold", "gold_worst": "worst domain", f"gold_{HELDOUT_DOMAIN}": "held-out domain"}

BySeed = Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldNumbers:
    name: str
    cells: Mapping[str, str]
    """Method -> the cell that stood for it."""
    numbers: Mapping[str, Mapping[str, BySeed]]
    """Method -> metric -> seed -> value."""

    def reach(self, metric: str) -> float:
        """Of the SFT policy, mean over seeds."""
        return fmean(self.numbers[REACH][metric].values())

    def gain(self, method: str, metric: str = "gold") -> float:
        """Over the best-tuned PPO w/ KL, mean over the seeds that both have."""
        ours, theirs = self.numbers[method][metric], self.numbers[OPPONENT][metric]
        return fmean(ours[seed] - theirs[seed] for seed in ours if seed in theirs)


def write_numbers(path: Path, rows: Iterable[Json]) -> None:
    """Rows of HEADER; of methods those that are KEPT."""
    kept = [row for row in rows if row["method"] == REACH or row["metric"] in KEPT]
    write_csv(path, HEADER, kept)


def read_numbers(path: Path) -> list[WorldNumbers]:
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    numbers: dict[str, dict[str, dict[str, dict[int, float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            cells[row["world"]][row["method"]] = row["cell"]
            numbers[row["world"]][row["method"]][row["metric"]][int(row["seed"])] = float(row["value"])
    return [WorldNumbers(name=name, cells=cells[name], numbers=found) for name, found in numbers.items()]


def write_map(results: Path, labels: Mapping[str, str]) -> None:
    """map.md and map.png of a directory. labels: of the methods."""
    sets = {name: read_numbers(results / f"{name}.csv.gz") for name in SETS if (results / f"{name}.csv.gz").exists()}
    shown = [table for name, worlds in sets.items() for table in _tables(name, worlds, labels)]
    shown.append(predictor_table(sets["map"], labels))
    (results / "map.md").write_text("\n".join(map(markdown, shown)), encoding="utf-8")
    (results / "map.png").write_bytes(to_png(map_picture(sets, labels)))


def _tables(name: str, worlds: Sequence[WorldNumbers], labels: Mapping[str, str]) -> list[Table]:
    return [worlds_table(name, worlds)] + [gain_table(name, worlds, labels, metric) for metric in GAINS]


def worlds_table(name: str, worlds: Sequence[WorldNumbers]) -> Table:
    """What is known of each world before any policy is trained, and what was chosen in it."""
    header = ("world", "price of one KL", "n of high, low", "Spearman, high and low", "pairs, high and low")
    header += ("cells", "gold of SFT", "gold of PPO w/ KL")
    rows = [
        (
            world.name,
            mean_cell(world.numbers[REACH][PRICE], ".3f"),
            f"{world.reach('best_n_high'):.1f}, {world.reach('best_n_low'):.1f}",
            f"{world.reach('spearman_high'):.2f}, {world.reach('spearman_low'):.2f}",
            f"{100 * world.reach('accuracy_high'):.0f} %, {100 * world.reach('accuracy_low'):.0f} %",
            ", ".join(world.cells[m] for m in (OPPONENT, PUBLISHED, TARGETS) if m in world.cells),
            mean_cell(world.numbers["sft"]["gold"]),
            mean_cell(world.numbers[OPPONENT]["gold"]),
        )
        for world in worlds
    ]
    note = "Mean over seeds; [95 % t interval over seeds]. High and low: prompts by the mean score of 16 responses."
    return Table(caption=f"Worlds: {name}", header=header, rows=rows, note=note)


def gain_table(name: str, worlds: Sequence[WorldNumbers], labels: Mapping[str, str], metric: str) -> Table:
    methods = [m for m in labels if m != OPPONENT and all(m in world.numbers for world in worlds)]
    rows = [
        (
            world.name,
            *(difference_cell(world.numbers[m][metric], world.numbers[OPPONENT][metric], "+.3f") for m in methods),
        )
        for world in worlds
    ]
    mean = ("mean of worlds", *(f"{fmean(world.gain(m, metric) for world in worlds):+.3f}" for m in methods))
    note = "Less the best-tuned PPO w/ KL on the same seed [95 % t interval]; seeds on which that is above 0."
    caption = f"Gain in {GAINS[metric]}: {name}"
    return Table(caption=caption, header=("world", *(labels[m] for m in methods)), rows=[*rows, mean], note=note)


def predictor_table(worlds: Sequence[WorldNumbers], labels: Mapping[str, str]) -> Table:
    """How well each number that needs no training foretells the gain in gold."""
    names = [name for name in worlds[0].numbers[REACH] if not name.startswith("best_of_")]
    methods = [m for m in labels if m != OPPONENT]
    rows = []
    for name in names:
        x = [world.reach(name) for world in worlds]
        if len(set(x)) > 1:
            found = [correlation(x, [world.gain(m) for world in worlds]) for m in methods]
            rows.append((name, *(f"{r:+.2f}" for r in found)))
    note = f"Pearson's correlation over {len(worlds)} worlds with the gain in gold over PPO w/ KL."
    caption = "What foretells the gain, before any policy is trained"
    return Table(caption=caption, header=("number", *(labels[m] for m in methods)), rows=rows, note=note)


def fit(worlds: Sequence[WorldNumbers], method: str, predictor: str = PRICE) -> tuple[float, float]:
    """(slope, intercept) of the gain in gold over a number known before training, by least squares."""
    return linear_regression([w.reach(predictor) for w in worlds], [w.gain(method) for w in worlds])


@styled
def map_picture(sets: Mapping[str, Sequence[WorldNumbers]], labels: Mapping[str, str]) -> Figure:
    """Left and middle: gain of PPO-GIL as published and with KL targets against the price of one KL, with the line of
    the map's worlds; rings are worlds that came later. Right: the map's worlds as they lie."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9.2, 3.8), layout="constrained", sharey=True)
    for ax, method, color in zip(axes, (PUBLISHED, TARGETS), PALETTE, strict=False):
        _draw_gains(ax, sets, method, color)
        ax.set_title(labels[method])
    axes[0].set_ylabel("gold, less that of PPO w/ KL")
    return figure


def _draw_gains(ax: Axes, sets: Mapping[str, Sequence[WorldNumbers]], method: str, color: str) -> None:
    ax.axhline(0, color="#8a8f98", linewidth=1)
    for name, worlds in sets.items():
        found = [world for world in worlds if method in world.numbers]
        x = [world.reach(PRICE) for world in found]
        gains = [
            t_interval([v - w.numbers[OPPONENT]["gold"][s] for s, v in w.numbers[method]["gold"].items()])
            for w in found
        ]
        y = [gain.value for gain in gains]
        half = [gain.high - gain.value for gain in gains]
        fill = color if name == "map" else "white"
        ax.errorbar(x, y, yerr=half, fmt="o", color=color, markerfacecolor=fill, linewidth=1, label=name)
    slope, intercept = fit(sets["map"], method)
    ends = [min(w.reach(PRICE) for w in sets["map"]), max(w.reach(PRICE) for w in sets["map"])]
    ax.plot(ends, [slope * end + intercept for end in ends], color=color, linewidth=1.5, alpha=0.6)
    ax.set_xlabel("what one KL for all prompts costs, of gold")


if __name__ == "__main__":
    from map import read_map

    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    write_map(directory, {name: method.label for name, method in read_map().methods.items()})
