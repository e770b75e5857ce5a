"""The picture of a reward model's quality: how sure it is against how often it is right, and its margins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_gil.evaluation.calibration import Bin
from megatron_gil.evaluation.report.figures import PARTS_PALETTE, colors, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PARTS = 6
"""More would not be told apart; the largest are drawn."""
INK, SOFT = "#1f2328", "#5a6068"


@styled
def quality_picture(
    bins: Sequence[Bin],
    margins: Mapping[str, Sequence[float]],
    part_bins: Mapping[str, Sequence[Bin]],
    *,
    color: Mapping[str, str] | None = None,
) -> Figure:
    """A reliability diagram (Guo et al. 2017, figure 1) beside histograms of margins.

    bins: of all pairs, drawn with intervals and, at the foot, their counts. margins: by part, all pairs where there is
    but one. part_bins: of the same parts, drawn as lines; empty for none. color: of each part; None: in their order.
    """
    from matplotlib import pyplot

    shown = sorted(margins, key=lambda name: -len(margins[name]))[:MAX_PARTS]
    shown = [name for name in margins if name in shown]
    color = color or colors(shown, PARTS_PALETTE)
    figure = pyplot.figure(figsize=(10.65, max(4.4, 0.75 * len(shown) + 1.2)), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.25))[0]
    _reliability(left.subplots(), bins, {name: part_bins[name] for name in shown if name in part_bins}, color)
    axes = right.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    edges = _edges(np.concatenate([np.asarray(margins[name], dtype=float) for name in shown]))
    for ax, name in zip(axes, shown, strict=True):
        _histogram(ax, name, np.asarray(margins[name], dtype=float), edges, color[name])
    left_out = len(margins) - len(shown)
    axes[0].set_title(f"margins, the {len(shown)} largest of {len(margins)}" if left_out else "margins")
    axes[-1].set_xlabel("score of the chosen response - score of the rejected one (in the end bars, all beyond)")
    return figure


def _reliability(ax: Axes, bins: Sequence[Bin], parts: Mapping[str, Sequence[Bin]], color: Mapping[str, str]) -> None:
    ax.plot([0.5, 1], [0.5, 1], color=SOFT, linewidth=0.9, linestyle=(0, (4, 2)))
    for name, found in parts.items():
        x, y = [b.confidence for b in found], [b.accuracy.value for b in found]
        ax.plot(x, y, "-o", color=color[name], markersize=2.5, linewidth=1.0, alpha=0.75, label=name)
    x = [b.confidence for b in bins]
    ax.vlines(x, [b.accuracy.low for b in bins], [b.accuracy.high for b in bins], color=INK, linewidth=1.2)
    values = [b.accuracy.value for b in bins]
    ax.plot(x, values, "-o", color=INK, markersize=5, linewidth=1.5, label="all, 95 %" if parts else "95 %")
    lowest = min([0.5, *(b.accuracy.low for b in bins), *(b.accuracy.value for f in parts.values() for b in f)])
    surest = max([0.6, *(b.confidence for found in (bins, *parts.values()) for b in found)])
    ax.set(xlim=(0.49, surest + 0.01), ylim=(lowest - 0.02, 1.02), title="reliability: below the dashes, too sure")
    ax.set_xlabel("confidence: sigmoid of |margin|")
    ax.set_ylabel("accuracy")
    if parts:
        ax.legend(loc="upper left", fontsize=8)


def _edges(margins: np.ndarray) -> Any:
    """Of 48 bars of one width; the outermost hundredth on either side is gathered in the first and the last."""
    low, high = np.quantile(margins, [0.01, 0.99])
    low, high = min(low, 0.0), max(high, 0.0)
    return np.linspace(low, high, 49) if high > low else np.array([-1.0, 1.0])


def _histogram(ax: Axes, name: str, margins: np.ndarray, edges: np.ndarray, color: str) -> None:
    counts, _ = np.histogram(np.clip(margins, edges[0], edges[-1]), bins=edges)
    ax.bar(edges[:-1], counts / len(margins), np.diff(edges), align="edge", color=color, alpha=0.55)
    ax.axvline(0, color=SOFT, linewidth=0.9, linestyle=(0, (4, 2)))
    ax.axvline(float(margins.mean()), color=color, linewidth=1.5)
    ax.set_yticks([])
    ax.grid(False)
    ax.spines["left"].set_visible(False)
    ax.text(0.0, 0.95, name, transform=ax.transAxes, weight="bold", color=INK, va="top")
    shape = f"mean {margins.mean():+.3g}, sd {margins.std():.3g}\n{len(margins):,} pairs"
    ax.text(0.0, 0.75, shape, transform=ax.transAxes, va="top", fontsize=8, color=SOFT)
