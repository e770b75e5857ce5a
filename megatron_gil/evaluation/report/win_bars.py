"""The picture of an evaluation: a bar per opponent, cut into win, tie and lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_gil.evaluation.report.figures import styled
from megatron_gil.evaluation.tables import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"win": "#0072b2", "tie": "#d9dce0", "lose": "#d55e00"}
INK = {"win": "#ffffff", "tie": "#1f2328", "lose": "#ffffff"}
NARROWEST = 0.06
"""Share of a bar that has room for its number."""


@styled
def win_bars(cells: Sequence[Cell]) -> Figure:
    """A panel for each policy, task and judge, in it a bar per opponent; cells without a verdict are left out."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    panels: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.rate.num_prompts:
            words = (cell.policy and f"{cell.policy} against", cell.task and f"on {cell.task}", f"by {cell.judge}")
            panels.setdefault(" ".join(filter(None, words)), []).append(cell)
    heights = [len(found) for found in panels.values()] or [1]
    figure, axes = pyplot.subplots(
        len(heights),
        1,
        squeeze=False,
        figsize=(8.2, 0.34 * sum(heights) + 0.62 * len(heights) + 0.5),
        gridspec_kw={"height_ratios": [0.34 * n + 0.3 for n in heights]},
        layout="constrained",
    )
    for ax, (title, found) in zip(axes[:, 0], panels.items(), strict=False):
        ax.set_title(title)
        _draw(ax, found)
    axes[-1, 0].set_xlabel("% of prompts; the line: 95 % interval of wins and half of the ties")
    figure.legend(
        handles=[Patch(color=color, label=name) for name, color in COLORS.items()], loc="outside upper left", ncols=3
    )
    return figure


def _draw(ax: Axes, cells: Sequence[Cell]) -> None:
    for place, cell in enumerate(cells):
        left = 0.0
        for kind, color in COLORS.items():
            share = getattr(cell.rate, kind).value
            ax.barh(place, share, left=left, height=0.66, color=color)
            if share >= NARROWEST:
                ax.text(
                    left + share / 2, place, f"{100 * share:.0f}", ha="center", va="center", color=INK[kind], size=8
                )
            left += share
        low, high = (0.5 + edge / 2 for edge in (cell.rate.margin.low, cell.rate.margin.high))
        ax.plot([low, high], [place + 0.42, place + 0.42], color="#1f2328", linewidth=1.6, solid_capstyle="butt")
    ax.axvline(0.5, color="#1f2328", linewidth=0.7, linestyle=(0, (3, 2)))
    ax.set_yticks(range(len(cells)), [cell.opponent for cell in cells])
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25", "50", "75", "100"])
    ax.set_xlim(0, 1)
    ax.invert_yaxis()
    ax.grid(False)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
