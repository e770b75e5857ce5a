"""Tables and picture of the map, from its kept numbers: python examples/miniature/map_tables.py [RESULTS]

map.csv.gz, and new.csv.gz and unseen.csv.gz where those worlds have run, hold a row per world, seed, method and metric;
map.md and map.png are written beside them.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation, fmean, linear_regression
from typing import TYPE_CHECKING

from cells import GRID
from tables import difference_cell, markdown, mean_cell, read_csv
from tidy import write_csv

from megatron_gil.demo.domains import HELDOUT_DOMAIN
from megatron_gil.evaluation.audit.advice import ONE_KL_FROM
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
AGREEMENT = "spearman_high"
"""What foretells the gain: Spearman's correlation of the reward model's scores with gold, among the SFT policy's
responses to the prompts of high score."""
FEW = 3
"""Of so many seeds or fewer the picture shows no interval, which would be wider than the picture."""
ADVISED_WITHIN = 0.01
"""Advice is right where the gold of what it advises is at most so much below that of the other choice."""
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

    def gains(self, method: str, metric: str = "gold") -> list[float]:
        """Over the best-tuned PPO w/ KL, on each seed that both have."""
        ours, theirs = self.numbers[method][metric], self.numbers[OPPONENT][metric]
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

    def gain(self, method: str, metric: str = "gold") -> float:
        """The mean of `gains`."""
        return fmean(self.gains(method, metric))


def write_numbers(path: Path, rows: Iterable[Json]) -> None:
    """Rows of HEADER; of methods those that are KEPT."""
    kept = [row for row in rows if row["method"] == REACH or row["metric"] in KEPT]
    write_csv(path, HEADER, kept)


def read_numbers(path: Path) -> list[WorldNumbers]:
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    numbers: dict[str, dict[str, dict[str, dict[int, float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for row in read_csv(path):
        cells[row["world"]][row["method"]] = row["cell"]
        numbers[row["world"]][row["method"]][row["metric"]][row["seed"]] = row["value"]
    return [WorldNumbers(name=name, cells=cells[name], numbers=dict(found)) for name, found in numbers.items()]


def read_sets(results: Path) -> dict[str, list[WorldNumbers]]:
    """Those of SETS that have run."""
    return {name: read_numbers(results / f"{name}.csv.gz") for name in SETS if (results / f"{name}.csv.gz").exists()}


def write_map(results: Path, labels: Mapping[str, str]) -> None:
    """map.md and map.png of a directory. labels: of the methods."""
    sets = read_sets(results)
    shown = [table for name, worlds in sets.items() for table in _tables(name, worlds, labels)]
    shown.append(predictor_table(sets[SETS[0]], labels))
    if len(sets) > 1:
        shown.append(forecast_table(sets, labels))
    (results / "map.md").write_text("\n".join(map(markdown, shown)), encoding="utf-8")
    (results / "map.png").write_bytes(to_png(map_picture(sets, labels)))


def _tables(name: str, worlds: Sequence[WorldNumbers], labels: Mapping[str, str]) -> list[Table]:
    return [worlds_table(name, worlds)] + [gain_table(name, worlds, labels, metric) for metric in GAINS]


def worlds_table(name: str, worlds: Sequence[WorldNumbers]) -> Table:
    """What is known of each world before any policy is trained, and what was chosen in it."""
    header = ("world", "Spearman, high and low", "n of high, low", "price of one KL", "pairs, high and low")
    header += ("cells", "gold of SFT", "gold of PPO w/ KL")
    rows = [
        (
            world.name,
            f"{world.reach(AGREEMENT):.2f}, {world.reach('spearman_low'):.2f}",
            f"{world.reach('best_n_high'):.1f}, {world.reach('best_n_low'):.1f}",
            f"{world.reach('price'):.3f}",
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
    methods = _compared(worlds, labels)
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


def _compared(worlds: Sequence[WorldNumbers], labels: Mapping[str, str]) -> list[str]:
    """The methods that have run in all of them, without the opponent."""
    return [m for m in labels if m != OPPONENT and all(m in world.numbers for world in worlds)]


def predictor_table(worlds: Sequence[WorldNumbers], labels: Mapping[str, str]) -> Table:
    """How well each number that needs no training foretells the gain in gold."""
    names = [name for name in worlds[0].numbers[REACH] if not name.startswith("best_of_") and name != "seconds"]
    methods = _compared(worlds, labels)
    rows = []
    for name in names:
        x = [world.reach(name) for world in worlds]
        if len(set(x)) > 1:
            found = [correlation(x, [world.gain(m) for world in worlds]) for m in methods]
            rows.append((name, *(f"{r:+.2f}" for r in found)))
    note = f"Pearson's correlation over {len(worlds)} worlds with the gain in gold over PPO w/ KL."
    caption = "What foretells the gain, before any policy is trained"
    return Table(caption=caption, header=("number", *(labels[m] for m in methods)), rows=rows, note=note)


def fit(worlds: Sequence[WorldNumbers], method: str, predictor: str = AGREEMENT) -> tuple[float, float]:
    """(slope, intercept) of the gain in gold over a number known before training, by least squares."""
    return linear_regression([w.reach(predictor) for w in worlds], [w.gain(method) for w in worlds])


def forecast_table(sets: Mapping[str, Sequence[WorldNumbers]], labels: Mapping[str, str]) -> Table:
    """The line of the map's worlds in those that came later, and whether an audit's advice was right there."""
    lines = {method: fit(sets[SETS[0]], method) for method in (PUBLISHED, TARGETS)}
    rows: list[tuple[str, ...]] = []
    for world in (world for name in SETS[1:] for world in sets.get(name, ())):
        agreement, cells = world.reach(AGREEMENT), list[str]()
        for method, (slope, intercept) in lines.items():
            found = world.numbers.get(method, {}).get("gold", {})  # none where the method has not run
            shown = difference_cell(found, world.numbers[OPPONENT]["gold"], "+.3f")
            cells += [f"{slope * agreement + intercept:+.3f}", shown]
        advised = "KL targets" if agreement < ONE_KL_FROM else "one KL"
        rows.append((world.name, f"{agreement:.2f}", *cells, advised, "right" if is_advice_right(world) else "wrong"))
    header = ("world", "Spearman, high", *(f"{labels[m]}: {what}" for m in lines for what in ("forecast", "found")))
    note = (
        f"Advice: KL targets where Spearman's correlation in the high group is below {ONE_KL_FROM:g}, else PPO w/ KL; "
    )
    note += f"right where its gold is at most {ADVISED_WITHIN:g} below that of the other."
    return Table(caption="Forecast and found", header=(*header, "advice", ""), rows=rows, note=note)


def is_advice_right(world: WorldNumbers) -> bool:
    gain = world.gain(TARGETS)
    return gain > -ADVISED_WITHIN if world.reach(AGREEMENT) < ONE_KL_FROM else gain < ADVISED_WITHIN


@styled
def map_picture(sets: Mapping[str, Sequence[WorldNumbers]], labels: Mapping[str, str]) -> Figure:
    """Gain of PPO-GIL as published and with KL targets against the agreement of reward and gold in the high group, with
    the line of the map's worlds; rings are worlds that came later, those without an interval of FEW seeds."""
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
        if not found:
            continue
        gains = [world.gains(method) for world in found]
        ax.errorbar(
            [world.reach(AGREEMENT) for world in found],
            [fmean(by_seed) for by_seed in gains],
            yerr=[_half_interval(by_seed) if len(by_seed) > FEW else 0.0 for by_seed in gains],
            fmt="o",
            color=color,
            markerfacecolor=color if name == SETS[0] else "white",
            linewidth=1,
        )
    slope, intercept = fit(sets[SETS[0]], method)
    ends = [pick(world.reach(AGREEMENT) for world in sets[SETS[0]]) for pick in (min, max)]
    ax.plot(ends, [slope * end + intercept for end in ends], color=color, linewidth=1.5, alpha=0.6)
    ax.set_xlabel("Spearman of reward and gold, prompts of high score")


def _half_interval(values: Sequence[float]) -> float:
    found = t_interval(values)
    return found.high - found.value


if __name__ == "__main__":
    from map import method_labels

    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    write_map(directory, method_labels())
