"""The grid's tables, from the numbers that it keeps: python examples/miniature/tables.py [RESULTS] [GRID.yaml]

Means over seeds with Student's intervals, paired differences, win rates: tables.md, from results.csv.gz and
wins.csv.gz.
"""

from __future__ import annotations

import csv
import gzip
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from cells import GRID, read_grid

from megatron_gil.demo.domains import HELDOUT_DOMAIN, TRAINING_DOMAINS
from megatron_gil.demo.gold import gold_score
from megatron_gil.demo.results import TIE_MARGIN
from megatron_gil.evaluation.comparisons import pair_rows
from megatron_gil.evaluation.judge import ScoreJudge
from megatron_gil.evaluation.report.page import Table
from megatron_gil.evaluation.report.runs import Json
from megatron_gil.evaluation.statistics import Estimate, t_interval
from megatron_gil.evaluation.winrate import judge_all

Numbers = Mapping[str, Mapping[str, Mapping[int, float]]]
"""method -> metric -> seed -> value."""
OURS = "gil"
PAIRS = [
    ("grpo_gil", "grpo"),
    ("gil_plain_kl", "ppo_kl"),
    ("beta_0", "ppo_kl"),
    ("beta_1", "beta_0"),
    ("ppo_kl_0.15", "ppo_kl"),
    ("gil_floor", "ppo_kl"),
    ("gil_floor", "ppo_kl_0.15"),
    ("gil_floor_beta_0", "ppo_kl_0.15"),
    ("gil_known", "ppo_kl"),
    ("gil_easy_hard", "ppo_kl"),
    ("gil_long", "ppo_kl_long"),
    ("gil_floor_long", "ppo_kl_long"),
    ("gil_floor_long", "ppo_kl_0.15_long"),
    ("gil_floor_long", "floor_beta_0_long"),
    ("floor_beta_0_long", "ppo_kl_0.15_long"),
    ("gil_targets", "ppo_kl_0.4"),
    ("gil_targets", "ppo_target"),
    ("gil_targets", "gil_0.4"),
    ("gil_0.4", "ppo_kl_0.4"),
    ("ppo_target", "ppo_kl_0.4"),
    ("gil_targets", "gil_1.6"),
    ("gil_1.6", "ppo_kl_0.4"),
    ("grpo_gil_targets", "grpo_0.8"),
    ("grpo_gil_targets", "grpo_target"),
    ("grpo_gil_targets", "grpo_gil_0.8"),
]
"""Compared besides PPO-GIL with everything."""

COLUMNS: Mapping[str, Mapping[str, str]] = {
    "Gold score on held-out prompts": {
        "gold": "gold",
        **{f"gold_{domain}": domain for domain in TRAINING_DOMAINS},
        "gold_worst": "worst domain",
        "gold_gap": "easy - hard",
        f"gold_{HELDOUT_DOMAIN}": f"held-out domain ({HELDOUT_DOMAIN})",
    },
    "Proxy, KL and the score distribution": {
        "proxy": "proxy score",
        "kl": "KL, nats a reply",
        "proxy_skewness": "skewness",
        "easy_skewness": "of easy domains",
        "hard_skewness": "of hard domains",
        "proxy_tail_mass": "mass beyond 2 sd",
        "distinct_replies": "distinct replies",
        "distinct_easy": "of easy domains",
        "distinct_hard": "of hard domains",
        "flattery": "courteous phrases a reply",
    },
    "Correlation of proxy and gold within a domain": {f"proxy_gold_{domain}": domain for domain in TRAINING_DOMAINS},
    "Over training": {
        "score_gap_start": "score gap at the start",
        "score_gap_end": "score gap at the end",
        "return_gap_start": "return gap of groups, start",
        "return_gap_end": "return gap of groups, end",
        "train_gold_peak": "gold at its best",
        "train_gold_drop": "gold lost since",
        "gradient_norm_max": "largest gradient norm",
    },
    "Inferred groups": {
        "ami_domains": "AMI with the domains",
        "ami_easy_hard": "AMI with easy/hard",
        "auc_easy": "AUC of easy",
        "auc_high_score": "AUC of high score",
        "mass_high": "mass of the high group",
        "mass_least": "least mass",
        "skipped_by_mass": "iterations without groups",
        "weight_std": "sd of omega",
        "negative_weights": "omega below 0",
        "flips": "flips",
        "kl_weight": "mean p(high)",
        "kl_high": "KL of the high group",
        "kl_low": "KL of the others",
    },
}


def write_tables(results: Path, labels: Mapping[str, str]) -> None:
    """tables.md of a directory with the numbers of a grid, finished or not."""
    rows = read_csv(results / "results.csv.gz")
    wins = read_csv(results / "wins.csv.gz") if (results / "wins.csv.gz").exists() else []
    done = {(row["method"], row["seed"]) for row in rows}
    seeds = sorted({seed for _, seed in done})
    without = {m: [seed for seed in seeds if (m, seed) not in done] for m in labels}
    missing = [
        f"{labels[m]}, seed{'s' * (len(found) > 1)} {' '.join(map(str, found))}"
        for m, found in without.items()
        if found
    ]
    shown = [*tables(collect(rows), labels), *([win_table(wins, labels)] if wins else [])]
    text = "\n".join(map(markdown, shown)) + f"\nCells not finished: {'; '.join(missing) or 'none'}.\n"
    (results / "tables.md").write_text(text, encoding="utf-8")


def read_csv(path: Path) -> list[Json]:
    """Rows with their numbers as numbers."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows: list[Json] = list(csv.DictReader(file))
    for row in rows:
        row["seed"] = int(row["seed"])
        for name in row.keys() & {"value", "win", "tie", "lose"}:
            row[name] = float(row[name])
    return rows


def collect(rows: Iterable[Json]) -> Numbers:
    """method -> metric -> seed -> value."""
    numbers: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        numbers[row["method"]][row["metric"]][row["seed"]] = row["value"]
    return numbers


def tables(numbers: Numbers, labels: Mapping[str, str]) -> list[Table]:
    """All but the win rates."""
    methods = [m for m in labels if "gold" in numbers.get(m, {})]
    made = [_of_means(caption, columns, methods, numbers, labels) for caption, columns in COLUMNS.items()]
    return [*made, _collapses(methods, numbers, labels), _differences(methods, numbers, labels)]


def _of_means(
    caption: str, columns: Mapping[str, str], methods: Sequence[str], numbers: Numbers, labels: Mapping[str, str]
) -> Table:
    shown = [m for m in methods if any(metric in numbers[m] for metric in columns)]
    rows = [(labels[m], *(mean_cell(numbers[m].get(metric, {})) for metric in columns)) for m in shown]
    note = "Mean over seeds and 95 % t interval over seeds; empty where a method has no such number."
    return Table(caption=caption, header=("method", *columns.values()), rows=rows, note=note)


def mean_cell(by_seed: Mapping[int, float], form: str = ".2f") -> str:
    return _short(t_interval(list(by_seed.values())), form) if by_seed else ""


def _short(estimate: Estimate, form: str = ".2f") -> str:
    """With its interval, which one seed does not have."""
    value = format(estimate.value, form)
    return value if math.isinf(estimate.low) else f"{value} [{estimate.low:{form}}, {estimate.high:{form}}]"


def collapsed(gold: Mapping[int, float], sft: Mapping[int, float]) -> dict[int, bool]:
    """Per seed: whether a run ended with a lower gold score than the SFT policy that it started from."""
    return {seed: value < sft[seed] for seed, value in gold.items() if seed in sft}


def _collapses(methods: Sequence[str], numbers: Numbers, labels: Mapping[str, str]) -> Table:
    sft = numbers["sft"]["gold"] if "sft" in numbers else {}
    rows = [
        (labels[m], f"{sum(found.values())} of {len(found)}")
        for m in methods
        if m != "sft"
        for found in [collapsed(numbers[m]["gold"], sft)]
    ]
    note = "A run has collapsed if its gold score on held-out prompts is below that of the SFT policy it started from."
    return Table(caption="Collapsed runs", header=("method", "collapsed"), rows=rows, note=note)


def _differences(methods: Sequence[str], numbers: Numbers, labels: Mapping[str, str]) -> Table:
    columns = {"gold": "gold", "gold_worst": "worst domain", f"gold_{HELDOUT_DOMAIN}": "held-out domain", "kl": "KL"}
    columns |= {"gold_gap": "gold: easy - hard", "score_gap_end": "score: easy - hard, last 10 iterations"}
    pairs = [(OURS, m) for m in methods if m != OURS] + PAIRS
    rows = [
        (
            f"{labels[a]} - {labels[b]}",
            *(difference_cell(numbers[a].get(c, {}), numbers[b].get(c, {})) for c in columns),
        )
        for a, b in pairs
        if a in methods and b in methods
    ]
    note = "Mean over seeds of the difference on the same seed [95 % t interval]; seeds on which it is above 0."
    return Table(caption="Paired differences", header=("pair", *columns.values()), rows=rows, note=note)


def difference_cell(ours: Mapping[int, float], theirs: Mapping[int, float], form: str = "+.2f") -> str:
    """Of the seeds that both have."""
    shared = sorted(set(ours) & set(theirs))
    if not shared:
        return ""
    found = t_interval([ours[s] - theirs[s] for s in shared])  # what a seed gives both of them cancels
    above = sum(ours[s] > theirs[s] for s in shared)
    return f"{_short(found, form)}, {above} of {len(shared)}"


def win_rows(replies: Mapping[tuple[str, int], Sequence[Json]]) -> list[Json]:
    """PPO-GIL against each method and GRPO-GIL against GRPO, per seed: shares of the prompts, gold judge."""
    judge = ScoreJudge("gold", gold_score, tie_margin=TIE_MARGIN)
    methods = list(dict.fromkeys(method for method, _ in replies))
    pairs = [(OURS, m) for m in methods if m != OURS] + PAIRS
    rows: list[Json] = []
    for ours, opponent in pairs:
        for seed in sorted({seed for _, seed in replies}):
            if (ours, seed) in replies and (opponent, seed) in replies:
                comparisons = pair_rows(replies[ours, seed], replies[opponent, seed], opponent)
                found = [judgment.outcome for judgment in judge_all(judge, comparisons)]
                shares = {v: found.count(v) / len(found) for v in ("win", "tie", "lose")}
                rows.append({"seed": seed, "ours": ours, "opponent": opponent, **shares})
    return rows


def win_table(rows: Sequence[Json], labels: Mapping[str, str]) -> Table:
    """The paper's Table 1; the interval of win - lose is over seeds."""
    cells: list[tuple[str, ...]] = []
    for ours, opponent in dict.fromkeys((row["ours"], row["opponent"]) for row in rows):
        found = [row for row in rows if (row["ours"], row["opponent"]) == (ours, opponent)]
        shares = [f"{100 * fmean(row[v] for row in found):.1f}" for v in ("win", "tie", "lose")]
        margin = t_interval([100 * (row["win"] - row["lose"]) for row in found])
        cells.append((labels[ours], labels[opponent], str(len(found)), *shares, _short(margin, "+.1f")))
    header = ("ours", "opponent", "seeds", "win %", "tie %", "lose %", "win - lose, % [95 %]")
    note = (
        f"Gold judge on the same held-out prompts, all five domains; a difference of at most {TIE_MARGIN} is a tie. "
        "The judge scores each reply by itself, so both orders give the same verdict."
    )
    return Table(caption="Win / tie / lose", header=header, rows=cells, note=note)


def markdown(table: Table) -> str:
    """The table for a Markdown page."""
    lines = [f"### {table.caption}", "", markdown_line(table.header), markdown_line(["---"] * len(table.header))]
    return "\n".join([*lines, *map(markdown_line, table.rows), "", table.note, ""])


def markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else GRID.with_name("results")
    cells = read_grid(Path(sys.argv[2]) if len(sys.argv) > 2 else GRID)
    write_tables(directory, {name: cell.label for name, cell in cells.items()})
