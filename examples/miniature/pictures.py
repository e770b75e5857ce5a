"""The grid's pictures: the frontier, curves over training, score distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tables import Numbers

from megatron_gil.demo.domains import HELDOUT_DOMAIN
from megatron_gil.evaluation.report.figures import (
    FrontierPoint,
    curve_grid,
    frontier,
    score_distributions,
    to_png,
)
from megatron_gil.evaluation.report.runs import Json

Curves = Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]
SHOWN = ("ppo", "ppo_kl", "gil", "gil_floor", "grpo", "grpo_gil", "sft", "dpo")
"""Methods in the pictures; the tables hold all. Those without curves come last, so that a method keeps its colour."""
PANELS = {
    "gold": "gold score of training samples",
    "policy/kl_sequence": "KL from the reference, nats a reply",
    "score gap": "score: easy less hard domains",
}
GROUP_PANELS = {
    "return gap": "return: high less low inferred group",
    "group/mass_0": "mass of group 0",
    "policy/kl_weight": "mean weight of the KL penalty",
}
GROUPED = ("gil", "gil_floor", "gil_plain_kl", "gil_own_model", "gil_score_groups", "beta_1", "grpo_gil")


def write_pictures(
    directory: Path,
    numbers: Numbers,
    replies: Mapping[tuple[str, int], Sequence[Json]],
    curves: Curves,
    labels: Mapping[str, str],
) -> None:
    """scores.png, frontier.png, training.png, groups.png: means over the seeds there are, in the curves with the range
    over seeds."""
    methods = [m for m in SHOWN if "gold" in numbers.get(m, {})]
    scores = {labels[m]: _scores(replies, m) for m in methods}
    drawn = {
        "scores": score_distributions(scores),
        "frontier": frontier({labels[m]: _frontier(curves[m]) for m in methods if m in curves}),
        "training": curve_grid(**_panels(curves, PANELS, methods, labels)),
        "groups": curve_grid(**_panels(curves, GROUP_PANELS, GROUPED, labels)),
    }
    for name, figure in drawn.items():
        (directory / f"{name}.png").write_bytes(to_png(figure))


def _scores(replies: Mapping[tuple[str, int], Sequence[Json]], method: str) -> list[float]:
    """Of all seeds, training domains."""
    found = [rows for (name, _), rows in replies.items() if name == method]
    return [row["score"] for rows in found for row in rows if row["group"] != HELDOUT_DOMAIN]


def _frontier(of_method: Mapping[str, Mapping[int, Sequence[float]]]) -> list[FrontierPoint]:
    """A point for each iteration that kept samples."""
    kl, proxy = of_method["policy/kl_sequence"], of_method["reward/score_mean"]
    return [
        FrontierPoint(kl=fmean(kl[i]), proxy=fmean(proxy[i]), gold=fmean(values))
        for i, values in of_method["gold"].items()
    ]


def _panels(
    curves: Curves, panels: Mapping[str, str], methods: Sequence[str], labels: Mapping[str, str]
) -> dict[str, Any]:
    """What curve_grid draws: means over seeds, and around them the range."""
    lines: dict[str, dict[str, Any]] = {title: {} for title in panels.values()}
    bands: dict[str, dict[str, Any]] = {title: {} for title in panels.values()}
    for metric, title in panels.items():
        for method in methods:
            by_iteration = curves.get(method, {}).get(metric)
            if by_iteration:
                iterations = sorted(by_iteration)  # a seed may lack one that the next has
                values = [by_iteration[i] for i in iterations]
                lines[title][labels[method]] = ([float(i) for i in iterations], [fmean(v) for v in values])
                bands[title][labels[method]] = ([min(v) for v in values], [max(v) for v in values])
    return {"panels": lines, "bands": bands}
