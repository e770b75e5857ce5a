"""The tables of docs/results.md, from the kept numbers: python examples/miniature/story.py writes them into it.

A table stands between the lines <!-- NAME --> and <!-- end -->, of which only the text around is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from cells import GRID, read_grid
from map import method_labels
from map_tables import AGREEMENT, WorldNumbers, forecast_table, gain_table, read_numbers, read_sets
from map_tables import RESULTS as MAP
from tables import Numbers, collapsed, collect, difference_cell, markdown_line, mean_cell, read_csv

from megatron_gil.demo.domains import HELDOUT_DOMAIN

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
HELD_OUT = f"gold_{HELDOUT_DOMAIN}"
OURS = "gil_targets"
OPPONENTS = ("ppo_kl_0.4", "ppo_target", "gil_0.4")
RIVALS = (
    (OURS, "ppo_kl_0.4"),
    (OURS, "gil_1.6"),
    ("grpo_gil_targets", "grpo_0.8"),
    ("grpo_gil_targets", "grpo_target"),
    ("grpo_gil_targets", "grpo_gil_0.8"),
)
"""KL targets and what they are compared with, each at its best eta."""
SHOWN = (
    *("sft", "dpo", "ppo", "ppo_kl", "ppo_kl_0.15"),
    *("gil", "gil_floor", "gil_floor_beta_0", "gil_log_prob"),
)


def story_tables() -> dict[str, str]:
    """Name -> Markdown."""
    results = GRID.with_name("results")
    first, third, fourth = (_read(results / name) for name in (".", "targets", "rivals"))
    labels = {name: cell.label for name, cell in read_grid(GRID.with_name("rivals.yaml")).items()}
    return {
        "targets": _means(third, ("sft", *OPPONENTS, OURS), labels),
        "against": _against(third, [(OURS, rival) for rival in OPPONENTS], labels),
        "rivals": _against(fourth, RIVALS, labels),
        "methods": _means(first, SHOWN, labels),
        "map": _map(),
        "forecast": _forecast(),
    }


def written(page: str, tables: Mapping[str, str]) -> str:
    """The page with its tables as they should be."""

    def replace(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n\n{tables[found[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- (?!end )(\w+) -->.*?<!-- end -->", replace, page, flags=re.S)


def _read(results: Path) -> Numbers:
    return collect(read_csv(results / "results.csv.gz"))


def _means(numbers: Numbers, methods: Sequence[str], labels: Mapping[str, str]) -> str:
    """A row for each method: mean gold with its interval over seeds, KL, and how many runs ended below SFT."""
    header = ("method", "gold", "worst domain", "held-out domain", "KL", "distinct responses, hard", "collapsed")
    rows = []
    for method in methods:
        found, runs = numbers[method], collapsed(numbers[method]["gold"], numbers["sft"]["gold"])
        gold = [mean_cell(found[name]) for name in ("gold", "gold_worst", HELD_OUT)]
        kl = f"{fmean(found['kl'].values()):.2f}" if "kl" in found else ""
        end = "" if method == "sft" else f"{sum(runs.values())} of {len(runs)}"
        rows.append((labels[method], *gold, kl, f"{fmean(found['distinct_hard'].values()):.2f}", end))
    return _markdown(header, rows)


def _against(numbers: Numbers, pairs: Sequence[tuple[str, str]], labels: Mapping[str, str]) -> str:
    """The first less the second of each pair, on the same seeds."""
    columns = {
        "gold": "gold",
        "gold_worst": "worst domain",
        HELD_OUT: "held-out domain",
        "score_gap_end": "score: easy - hard",
    }
    rows = [
        (labels[ours], labels[rival], *(difference_cell(numbers[ours][c], numbers[rival][c], "+.3f") for c in columns))
        for ours, rival in pairs
    ]
    return _markdown(("", "less", *columns.values()), rows)


def _map() -> str:
    """A row for each world of the map: what is known before training, and each method's gain in gold."""
    worlds = sorted(read_numbers(MAP / "map.csv.gz"), key=lambda world: world.reach(AGREEMENT))
    labels = method_labels()
    gains = gain_table("map", worlds, labels, "gold")
    header = ("comparisons, flattery", "Spearman, high", "eta", *gains.header[1:])
    known = [(_name(w.name), f"{w.reach(AGREEMENT):.2f}", _etas(w)) for w in worlds] + [(gains.rows[-1][0], "", "")]
    return _markdown(header, [(*cells, *row[1:]) for cells, row in zip(known, gains.rows, strict=True)])


def _etas(world: WorldNumbers) -> str:
    return ", ".join(world.cells[method].rpartition("_")[2] for method in ("ppo", "gil"))


def _forecast() -> str:
    table = forecast_table(read_sets(MAP), method_labels())
    return _markdown(table.header, [(_name(row[0]), *row[1:]) for row in table.rows])


def _name(world: str) -> str:
    """hard_3_flip_0.1_flattery_2 as "x 3, flips 0.1, x 2"."""
    parts = world.split("_")
    flips = f", flips {parts[3]}" if "flip" in parts else ""
    return f"x {parts[1]}{flips}, x {parts[-1]}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(map(markdown_line, lines))


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), story_tables()), encoding="utf-8")
