"""The pictures of an evaluation: a bar per opponent, cut into win, tie and lose; win rate against length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_gil.evaluation.report.figures import colors, draw_legend, styled
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

    panels = _panels(cells)
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


@styled
def length_curves(cells: Sequence[Cell]) -> Figure:
    """The same panels with a line per opponent: wins and half of the ties over our length less theirs, at the median of
    each bin, with 95 % intervals."""
    from matplotlib import pyplot

    panels = _panels(cells)
    color = colors(list(dict.fromkeys(cell.opponent for cell in cells)))
    columns = min(2, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, squeeze=False, sharey=True, figsize=(8.2, 2.5 * rows + 0.4), layout="constrained"
    )
    for ax in axes.ravel()[len(panels) :]:
        ax.remove()
    for ax, (title, found) in zip(axes.ravel(), panels.items(), strict=False):
        ax.set_title(title)
        ax.axhline(0.5, color="#8a8f98", linewidth=0.8, linestyle=(0, (3, 2)))
        for cell in found:
            bins = cell.length.bins if cell.length is not None else ()
            middles = [part.median for part in bins]
            ax.plot(middles, [p.win_rate.value for p in bins], "-o", color=color[cell.opponent], markersize=4)
            ax.vlines(
                middles, [p.win_rate.low for p in bins], [p.win_rate.high for p in bins], color=color[cell.opponent]
            )
        ax.set_ylim(0, 1)
        ax.set_xlabel("our length less theirs, characters")
    draw_legend(figure, color)
    return figure


def _panels(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Title -> its cells; those without a verdict are left out."""
    panels: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.rate.num_prompts:
            words = (cell.policy, cell.task and f"on {cell.task}", f"by {cell.judge}")
            panels.setdefault(" ".join(filter(None, words)), []).append(cell)
    return panels


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
