"""Pictures. Each function returns a matplotlib Figure; `to_svg` and `to_png` write it without a display."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from megatron_gil.evaluation.statistics import skewness

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[Sequence[float], Sequence[float]]
"""(iterations, values)."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
"""Okabe and Ito's palette: colour-blind readers can tell these colours apart too."""
PARTS_PALETTE = ("#332288", "#ddcc77", "#117733", "#cc6677", "#88ccee", "#882255", "#44aa99", "#999933")
"""Tol's muted palette, for parts of a run: it shares no colour with PALETTE, which is for runs."""
Spans = Sequence[tuple[float, float]]
"""(first, last) iterations."""
COLUMNS = 3
"""Panels beside one another in a grid, at most."""

_STYLE: Any = {  # matplotlib types the keys as literals
    "font.size": 9.0,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3c4148",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#5a6068",
    "ytick.color": "#5a6068",
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "megatron-gil",
    "figure.facecolor": "white",
    "text.parse_math": False,  # names of runs and groups come from the user
}

_NO_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
"""Characters that no SVG can hold."""

Drawing = TypeVar("Drawing", bound=Callable[..., Any])


def styled(function: Drawing) -> Drawing:
    """Makes a function run with our style and without a display. matplotlib is not imported before it runs."""

    @functools.wraps(function)
    def drawn(*args: Any, **options: Any) -> Any:
        import matplotlib

        matplotlib.use("Agg")
        with matplotlib.rc_context(_STYLE):
            return function(*args, **options)

    return cast(Drawing, drawn)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """One policy of one method: its KL from the reference, and the scores that it reached."""

    kl: float
    """Mean over responses of log pi(response) - log pi_ref(response), nats."""
    proxy: float
    """Mean score of the reward model."""
    gold: float | None = None
    """Mean of a score that training did not see; None where there is none."""


def colors(names: Sequence[str], palette: Sequence[str] = PALETTE) -> dict[str, str]:
    """One colour per name, the same in every picture that gets the same names."""
    return {name: palette[i % len(palette)] for i, name in enumerate(names)}


@styled
def curve_grid(
    panels: Mapping[str, Mapping[str, Series]],
    *,
    smooth: int = 0,
    share_y: bool = False,
    bands: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]] | None = None,
    color: Mapping[str, str] | None = None,
    alarms: Mapping[str, Mapping[str, Spans]] | None = None,
    legend: bool = True,
) -> Figure:
    """A panel per metric, in it a line per run (or group) over iterations.

    smooth: iterations of the running mean that is drawn over the faint raw curve; 0: a twentieth of the curve's length.
    bands: (low, high) around a line, by panel and name; smoothed like the line, drawn in place of the raw curve. color:
    colour of each name; None: in the order of the names. alarms: when an alarm stood, by panel and name; drawn as a
    shade behind the curves, and a strip for each name at the foot.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    color = color or colors(names)
    figure, axes = _grid(len(panels), share_y)
    for ax, (title, lines) in zip(axes, panels.items(), strict=False):
        ax.set_title(title)
        for name, (x, y) in lines.items():
            band = (bands or {}).get(title, {}).get(name)
            _curve(ax, x, y, color[name], smooth, band)
        for place, (name, spans) in enumerate((alarms or {}).get(title, {}).items()):
            _shade(ax, spans, color[name], place)
    for ax in axes[-COLUMNS:]:
        ax.set_xlabel("iteration")
    if len(names) > 1 and legend:
        draw_legend(figure, {name: color[name] for name in names})
    return figure


@styled
def score_distributions(scores: Mapping[str, Sequence[float]], *, color: Mapping[str, str] | None = None) -> Figure:
    """A histogram of scores per method, all on one axis; a line shows the normal distribution of the same mean and
    standard deviation."""
    from matplotlib import pyplot

    edges = np.histogram_bin_edges(np.concatenate([np.asarray(v, dtype=float) for v in scores.values()]), bins=40)
    figure, axes = pyplot.subplots(
        len(scores), 1, sharex=True, squeeze=False, figsize=(8.2, 1.0 * len(scores) + 0.6), layout="constrained"
    )
    of_name = color or colors(list(scores))
    for ax, (name, values) in zip(axes[:, 0], scores.items(), strict=True):
        own = of_name[name]
        ax.hist(values, bins=edges, density=True, color=own, alpha=0.55)
        _normal(ax, np.asarray(values, dtype=float), edges)
        ax.axvline(float(np.mean(values)), color=own, linewidth=1.5)
        ax.set_yticks([])
        ax.grid(False)
        ax.spines["left"].set_visible(False)
        ax.text(0.0, 0.86, name, transform=ax.transAxes, weight="bold", color=own, va="top")
        shape = f"mean {np.mean(values):.2f}\nsd {np.std(values):.2f}\nskewness {skewness(values):+.2f}"
        ax.text(0.0, 0.62, shape, transform=ax.transAxes, va="top", fontsize=8, color="#5a6068")
    axes[-1, 0].set_xlabel("score")
    return figure


@styled
def frontier(methods: Mapping[str, Sequence[FrontierPoint]], *, color: Mapping[str, str] | None = None) -> Figure:
    """Proxy score, and gold where all points have one, against sqrt(KL), the axis on which Gao et al. (arXiv
    2210.10760) fit both. A method's points are joined in the order given, the last one is filled."""
    from matplotlib import pyplot

    color = {name: (color or colors(list(methods)))[name] for name in methods}
    shown = {"proxy": "proxy: the reward model's score", "gold": "gold score"}
    if any(point.gold is None for points in methods.values() for point in points):
        del shown["gold"]
    width = 10.65 if len(shown) == 2 else 7.0
    figure, axes = pyplot.subplots(
        1, len(shown), squeeze=False, figsize=(width, 3.3), sharex=True, layout="constrained"
    )
    for ax, (kind, title) in zip(axes[0], shown.items(), strict=True):
        for name, points in methods.items():
            x, y = [max(point.kl, 0.0) ** 0.5 for point in points], [getattr(point, kind) for point in points]
            ax.plot(x, y, "-o", color=color[name], markersize=4, markerfacecolor="white", linewidth=1.3)
            ax.plot(x[-1], y[-1], "o", color=color[name], markersize=7)
        ax.set_title(title)
        ax.set_xlabel("sqrt(KL from the reference), nats$^{1/2}$", parse_math=True)
    draw_legend(figure, color)
    return figure


@styled
def bars(
    values: Mapping[str, Mapping[str, float]],
    *,
    label: str,
    color: Mapping[str, str] | None = None,
) -> Figure:
    """Groups of bars: {method: {category: value}}, categories on the x axis."""
    from matplotlib import pyplot

    categories = list(dict.fromkeys(c for parts in values.values() for c in parts))
    color, width = {name: (color or colors(list(values)))[name] for name in values}, 0.8 / len(values)
    figure, ax = pyplot.subplots(figsize=(10.65, 2.9), layout="constrained")
    for i, (name, parts) in enumerate(values.items()):
        x = np.arange(len(categories)) + (i - (len(values) - 1) / 2) * width
        heights = [parts.get(c, float("nan")) for c in categories]
        ax.bar(x, heights, width * 0.92, color=color[name])
    ax.set_xticks(range(len(categories)), categories)
    ax.set_ylabel(label)
    ax.grid(False, axis="x")
    draw_legend(figure, color)
    return figure


@styled
def to_svg(figure: Figure) -> str:
    """The figure as SVG text, the same bytes for the same figure; the figure is closed."""
    from matplotlib import pyplot

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return _NO_XML.sub("?", text.getvalue())


@styled
def to_png(figure: Figure) -> bytes:
    """The figure as a PNG of 256 colours, a few tens of kB however many points it has; the figure is closed."""
    from matplotlib import pyplot
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    pyplot.close(figure)
    with Image.open(drawn) as image:
        few_colors = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few_colors.save(small, format="png", optimize=True)
    return small.getvalue()


def _grid(count: int, share_y: bool) -> tuple[Figure, list[Axes]]:
    from matplotlib import pyplot

    rows, columns = -(-count // COLUMNS), min(COLUMNS, count)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        squeeze=False,
        sharey=share_y,
        figsize=(10.65 / 3 * max(columns, 1) if columns < 3 else 10.65, 2.15 * rows + 0.3),
        layout="constrained",
    )
    flat = list(axes.ravel())
    for ax in flat[count:]:
        ax.remove()
    return figure, flat[:count]


def _curve(
    ax: Axes,
    x: Sequence[float],
    y: Sequence[float],
    color: str,
    smooth: int,
    band: tuple[Sequence[float], Sequence[float]] | None,
) -> None:
    width = smooth or max(1, len(y) // 20)
    if band is not None:
        low, high = (running_mean(edge, width) for edge in band)
        ax.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
    elif width > 1:
        ax.plot(x, y, color=color, linewidth=0.7, alpha=0.25)
    ax.plot(x, running_mean(y, width), color=color, linewidth=1.6, marker="o" if len(y) == 1 else "")


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at each place (of fewer at the start)."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def _normal(ax: Axes, values: np.ndarray, edges: np.ndarray) -> None:
    spread = values.std()
    if spread > 0:
        x = np.linspace(edges[0], edges[-1], 200)
        density = np.exp(-0.5 * ((x - values.mean()) / spread) ** 2) / (spread * np.sqrt(2 * np.pi))
        ax.plot(x, density, color="#3c4148", linewidth=0.9, linestyle=(0, (4, 2)))


def _shade(ax: Axes, spans: Spans, color: str, place: int) -> None:
    """place: the strip's place at the foot of the panel, from 0."""
    for first, last in spans:
        left, right = first - 0.5, last + 0.5
        ax.axvspan(left, right, color=color, alpha=0.08, linewidth=0)
        ax.axvspan(left, right, ymin=0.045 * place, ymax=0.045 * place + 0.035, color=color, alpha=0.9, linewidth=0)


def draw_legend(figure: Figure, color: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, linewidth=3, label=name) for name, c in color.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 6), handlelength=1.2)
