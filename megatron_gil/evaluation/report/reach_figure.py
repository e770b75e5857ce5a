"""The picture of how far a reward can be followed in each group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_gil.evaluation.best_of_n import BestOfN, kl_of_best_of
from megatron_gil.evaluation.report.figures import draw_legend, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def reach_picture(groups: Mapping[str, BestOfN], *, color: Mapping[str, str]) -> Figure:
    """Mean trusted number of the best of n against its KL, a line for each group with its interval over prompts; a ring
    where it is highest, and n along the lines."""
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7.4, 3.6), layout="constrained")
    for name, group in groups.items():
        kl = [kl_of_best_of(n + 1) for n in range(len(group.curve))]
        values = [point.value for point in group.curve]
        ax.plot(kl, values, "-o", color=color[name], markersize=3, linewidth=1.5)
        ax.fill_between(kl, [p.low for p in group.curve], [p.high for p in group.curve], color=color[name], alpha=0.15)
        best = group.best_n - 1
        ax.plot(kl[best], values[best], "o", color=color[name], markersize=9, fillstyle="none", markeredgewidth=1.5)
        ax.annotate(f"n = {group.best_n}", (kl[best], values[best]), (0, 9), textcoords="offset points", ha="center")
    ax.set_xlabel("KL of the best of n, nats a response")
    ax.set_ylabel("trusted number, mean")
    ax.margins(y=0.15)
    draw_legend(figure, {name: color[name] for name in groups})
    return figure
