"""Curves of a run as SVG for a page and as PNG. The only user of matplotlib."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

MOST_POINTS = 1000  # of a curve; more are binned, with the range of each bin drawn behind its mean
INK, GRID = "#808080", "#80808040"  # legible on light and dark pages
COLOURS = ("#3b82c4", "#d97706", "#3f9e6e", "#b0508c", "#7c6bc4", "#c0504d", "#5b8f99", "#9a7b4f")
MARK_STYLES = {
    "restart": ("#808080", "--", "|"),
    "rollback": ("#c0504d", "-", "<"),
    "spike": ("#d97706", ":", "^"),
    "skipped": ("#b0508c", ":", "x"),
}
MOST_MARKS = 400  # lines of one kind that a picture can still part
SCRIPTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei")  # for names in other scripts
FEW = 3  # points that a line alone would not show


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over steps; `points` draws dots, for values that are few."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    points: bool = False
    colour: str | None = None
    """None: one of COLOURS, by its place in the chart."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One diagram."""

    name: str
    title: str
    unit: str
    curves: Sequence[Curve]
    logarithmic: bool = False
    large: bool = False
    """Values are shown with the signs of thousands, millions and more: 1.3 M."""
    marks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Kind of event, see MARK_STYLES -> its steps."""
    across: str = "step"
    """What `steps` count, where it is not steps."""
    large_across: bool = False
    """As `large`, for the values of `steps`."""


@dataclass(frozen=True, kw_only=True)
class Binned:
    """A curve of at most MOST_POINTS bins: mean, lowest and highest of each. Values that are not finite are left out."""

    steps: np.ndarray
    means: np.ndarray
    lows: np.ndarray
    highs: np.ndarray


def binned(steps: Sequence[float], values: Sequence[float], most: int = MOST_POINTS) -> Binned:
    """Gather a long curve into bins of equally many points."""
    steps_N, values_N = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    finite = np.isfinite(values_N)
    steps_N, values_N = steps_N[finite], values_N[finite]
    if len(values_N) <= most:
        return Binned(steps=steps_N, means=values_N, lows=values_N, highs=values_N)
    edges = np.linspace(0, len(values_N), most + 1).astype(int)[:-1]
    counts = np.diff(edges, append=len(values_N))
    return Binned(
        steps=np.add.reduceat(steps_N, edges) / counts,
        means=np.add.reduceat(values_N, edges) / counts,
        lows=np.minimum.reduceat(values_N, edges),
        highs=np.maximum.reduceat(values_N, edges),
    )


def draw(chart: Chart, folder: Path) -> str:
    """Write `folder/NAME.png` and return the chart as an SVG element for a page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    families = ["sans-serif", *(name for name in SCRIPTS if name in installed)]
    look = {"svg.fonttype": "none", "svg.hashsalt": chart.name, "font.size": 11, "font.family": families}
    with matplotlib.rc_context(look), warnings.catch_warnings():
        # A script without a font is boxes in the PNG; on the page the browser has its own fonts.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        _fill(figure.add_subplot(), chart)
        figure.savefig(folder / f"{chart.name}.png", dpi=150, facecolor="white", metadata={"Software": None})
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inline(text.getvalue(), chart)


def _fill(axes: Any, chart: Chart) -> None:
    curves = [binned(curve.steps, curve.values) for curve in chart.curves]
    for number, (curve, data) in enumerate(zip(chart.curves, curves, strict=True)):
        colour = curve.colour or COLOURS[number % len(COLOURS)]
        if curve.points or len(data.means) <= FEW:
            axes.plot(data.steps, data.means, "o-", ms=4, lw=1.2, color=colour, label=curve.label)
            continue
        if len(data.means) < len(curve.values):
            axes.fill_between(data.steps, data.lows, data.highs, color=colour, alpha=0.22, lw=0)
        axes.plot(data.steps, data.means, lw=1.3, color=colour, label=curve.label)
    for kind, steps in chart.marks.items():
        _mark(axes, kind, steps)
    title = f"{chart.title} ({chart.unit})" if chart.unit else chart.title
    limit = None if chart.logarithmic else _limit(curves)
    if limit is not None:
        low = min(float(data.lows.min()) for data in curves if len(data.lows))
        axes.set_ylim(low - 0.05 * (limit - low), limit)
        title += f", values above {limit:.3g} are cut off"
    if chart.logarithmic:
        axes.set_yscale("log")
    axes.set_title(title, loc="left", color=INK, fontsize=12)
    axes.set_xlabel(chart.across, color=INK)
    axes.margins(x=0.03 if all(curve.points for curve in chart.curves) else 0.01)  # so that no dot is cut in half
    _style(axes, chart)


def _mark(axes: Any, kind: str, steps: Sequence[float]) -> None:
    """A line for every event, with its sign at the top edge; the legend has their number.

    Events nearer than a picture can part share a line, so that many of them cost no more than a few.
    """
    colour, style, sign = MARK_STYLES[kind]
    steps_N = np.unique(np.asarray(steps, dtype=float))
    if len(steps_N) > MOST_MARKS:
        place_N = np.linspace(steps_N[0], steps_N[-1], MOST_MARKS)
        steps_N = steps_N[np.unique(np.searchsorted(steps_N, place_N).clip(max=len(steps_N) - 1))]
    across = axes.get_xaxis_transform()  # x in steps, y in parts of the height
    axes.vlines(steps_N, 0, 1, transform=across, color=colour, ls=style, lw=0.8, alpha=0.55, zorder=1)
    top_N = np.full(len(steps_N), 0.98)
    label = f"{kind} ({len(steps):,})"
    axes.plot(steps_N, top_N, sign, ms=5, mew=1.2, color=colour, transform=across, label=label, zorder=3)


def _style(axes: Any, chart: Chart) -> None:
    """Numbers that can be read, a quiet frame, the legend below the diagram where it hides nothing."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    plain = FuncFormatter(lambda value, _: f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" ") if chart.large_across else plain)
    if chart.large:
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.tick_params(colors=INK, which="both")
    axes.yaxis.get_offset_text().set_color(INK)
    axes.grid(color=GRID, lw=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    if len(chart.curves) + len(chart.marks) > 1:
        axes.figure.legend(frameon=False, labelcolor=INK, fontsize=10, ncols=4, loc="outside lower center")


def _limit(curves: Sequence[Binned]) -> float | None:
    """Upper end of the axis where a few values would flatten all others; None: as high as the values."""
    values = np.concatenate([data.highs for data in curves])
    if len(values) < 20:
        return None
    usual = values[values <= 5 * np.quantile(values, 0.9)]
    return 1.05 * float(usual.max()) if 0 < len(usual) < len(values) and usual.max() > 0 else None


def _inline(svg: str, chart: Chart) -> str:
    """The SVG as an element: no header, no metadata, its ids unlike those of other charts on the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{chart.name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{chart.name}-", svg)
    svg = re.sub(r' width="[^"]+" height="[^"]+"|(?<=<svg) height="[^"]+" ', " ", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(chart.title)}"', 1)
