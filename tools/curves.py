"""Curves of a run as SVG for a page and as PNG. The only user of matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MOST_POINTS = 1000  # of a curve; more are binned, with the range of each bin drawn behind its mean
INK, GRID = "#808080", "#80808040"  # legible on light and dark pages
COLOURS = ("#3b82c4", "#d97706", "#3f9e6e", "#b0508c", "#7c6bc4", "#c0504d", "#5b8f99", "#9a7b4f")
MARK_STYLES = {
    "restart": ("#808080", "--"),
    "rollback": ("#c0504d", "-"),
    "spike": ("#d97706", ":"),
    "skipped": ("#b0508c", ":"),
}
FEW = 3  # points that a line alone would not show


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over steps; `points` draws dots, for values that are few."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    points: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One diagram. `marks`: kind of event -> steps, see MARK_STYLES."""

    name: str
    title: str
    unit: str
    curves: Sequence[Curve]
    logarithmic: bool = False
    marks: Mapping[str, Sequence[float]] = field(default_factory=dict)


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

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": chart.name, "font.size": 9, "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        _fill(figure.add_subplot(), chart)
        figure.savefig(folder / f"{chart.name}.png", dpi=150, facecolor="white", metadata={"Software": None})
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inline(text.getvalue(), chart)


def _fill(axes: object, chart: Chart) -> None:
    for number, curve in enumerate(chart.curves):
        colour = COLOURS[number % len(COLOURS)]
        data = binned(curve.steps, curve.values)
        if curve.points or len(data.means) <= FEW:
            axes.plot(data.steps, data.means, "o-", ms=4, lw=1.2, color=colour, label=curve.label)
            continue
        if len(data.means) < len(curve.values):
            axes.fill_between(data.steps, data.lows, data.highs, color=colour, alpha=0.22, lw=0)
        axes.plot(data.steps, data.means, lw=1.3, color=colour, label=curve.label)
    for kind, steps in chart.marks.items():
        colour, style = MARK_STYLES[kind]
        for index, step in enumerate(list(steps)[:200]):
            axes.axvline(step, color=colour, ls=style, lw=0.9, alpha=0.8, label=kind if index == 0 else None)
    limit = _limit(chart)
    if limit is not None:
        low = min(float(binned(curve.steps, curve.values).lows.min()) for curve in chart.curves)
        axes.set_ylim(low - 0.05 * (limit - low), limit)
        axes.text(0.995, 0.97, f"spikes above {limit:.3g} are cut", transform=axes.transAxes, ha="right", va="top", color=INK)
    if chart.logarithmic:
        axes.set_yscale("log")
    axes.set_title(f"{chart.title} ({chart.unit})" if chart.unit else chart.title, loc="left", color=INK, fontsize=10)
    axes.set_xlabel("step", color=INK)
    axes.tick_params(colors=INK, which="both")
    axes.grid(color=GRID, lw=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    if len(chart.curves) + len(chart.marks) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, ncols=4, loc="best")


def _limit(chart: Chart) -> float | None:
    """Upper end of the axis where a few values would flatten all others; None: as high as the values."""
    values = np.concatenate([binned(curve.steps, curve.values).highs for curve in chart.curves])
    if chart.logarithmic or len(values) < 20:
        return None
    usual = float(np.quantile(values, 0.98))
    return 1.05 * usual if usual > 0 and values.max() > 3 * usual else None


def _inline(svg: str, chart: Chart) -> str:
    """The SVG as an element: no header, no metadata, its ids unlike those of other charts on the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{chart.name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{chart.name}-", svg)
    svg = re.sub(r' width="[^"]+" height="[^"]+"|(?<=<svg) height="[^"]+" ', " ", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{chart.title}"', 1)
