"""Which charts a run's page has, and what is drawn in each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from tools.curves import INK, Chart, Curve
from tools.history import History
from train.probes import CHANCE

NORMS_SHOWN = 8
FIGURES_SHOWN = 8  # of a task in one chart
CHANCE_POINTS = 50  # of a level line: so many are drawn without dots


def make_charts(history: History) -> list[Chart]:
    """The charts for which there are values."""
    marks = {
        "restart": history.restarts,
        "rollback": history.rollbacks,
        "spike": history.steps_with("spike"),
        "skipped": history.steps_with("skipped"),
    }
    marks = {kind: steps for kind, steps in marks.items() if len(steps)}
    stopped = {kind: steps for kind, steps in marks.items() if kind in ("restart", "rollback")}

    def curve(name: str, label: str, *, scale: float = 1.0) -> Curve:
        steps, values = history.column(name)
        return Curve(label=label, steps=steps, values=scale * values)

    losses = [curve("loss", "training")]
    for name, scores in sorted(history.held_out.items()):
        label = f"held out: {name}" if name else "held out"
        losses.append(Curve(label=label, steps=sorted(scores), values=[scores[step] for step in sorted(scores)], points=True))
    rate = [curve("tokens_per_second", "all devices")]
    shares = [curve("mfu", "full attention", scale=100), curve("mfu_causal", "causal attention", scale=100)]
    busy = [curve("busy_seconds_median", "median rank"), curve("busy_seconds_max", "slowest rank")]
    clipped = [curve("grad_norm", "before clipping")]
    charts = [
        Chart(name="loss", title="loss", unit="nats per token", curves=losses, marks=marks),
        *_task(history, stopped),
        Chart(name="probes", title="probes", unit="% right", curves=_probes(history), marks=stopped),
        Chart(name="probe_gains", title="probes: loss at first less loss the second time", unit="nats", curves=_gains(history)),
        Chart(name="lr", title="learning rate", unit="", curves=[curve("lr", "learning rate")]),
        Chart(name="grad_norm", title="gradient norm", unit="", curves=clipped, logarithmic=True, marks=marks),
        Chart(name="throughput", title="throughput", unit="tokens/s", curves=rate, marks=stopped, large=True),
        Chart(name="mfu", title="model FLOPs utilisation", unit="%", curves=shares),
        Chart(name="memory", title="memory of the first rank", unit="GiB", curves=[curve("memory_gib", "memory")]),
        *(
            Chart(name=name, title=title, unit="", logarithmic=True, curves=[curve(key, label) for key, label in keys])
            for name, title, keys in _norms(history)
        ),
        Chart(name="busy", title="computing time of a step", unit="s", curves=busy),
        Chart(name="stall", title="held up by a checkpoint", unit="s", curves=[curve("checkpoint_stall_seconds", "stall")]),
        Chart(name="goodput", title="goodput", unit="%", curves=[curve("goodput", "goodput", scale=100)], marks=stopped),
    ]
    filled = []
    for chart in charts:
        curves = [one for one in chart.curves if np.isfinite(one.values).any()]
        if curves:
            filled.append(replace(chart, curves=curves))
    return filled


def _task(history: History, marks: Mapping[str, Sequence[float]]) -> list[Chart]:
    """The figures of the task that a model is fine-tuned on, those of 0 to 1 apart from those of 0 to 100."""
    found = {
        name.removeprefix("task/"): sorted(values.items())
        for name, values in history.evaluations.get("", {}).items()
        if name.startswith("task/")
    }
    large = [name for name, pairs in found.items() if any(abs(value) > 1 for _, value in pairs)]
    small = [name for name in found if name not in large]
    for names in (large, small):  # what is well known is drawn together, before parts and means of it such as recall_micro
        names.sort(key=lambda name: "_" in name)
    charts = []
    for start, names in [(start, kind) for kind in (small, large) for start in range(0, len(kind), FIGURES_SHOWN)]:
        shown = names[start : start + FIGURES_SHOWN]
        curves = [
            Curve(label=name, steps=[step for step, _ in found[name]], values=[value for _, value in found[name]], points=True)
            for name in shown
        ]
        number = f"_{len(charts) + 1}" if charts else ""
        charts.append(Chart(name=f"task{number}", title="held-out rows", unit="", curves=curves, marks=marks))
    return charts


def _probes(history: History) -> list[Curve]:
    """Right answers of each probe in percent, and what guessing reaches, from the first evaluation with them to the last."""
    curves, chances, steps = [], {}, []
    for name, chance in CHANCE.items():
        if found := sorted(history.probes.get(name, {}).items()):
            chances.setdefault(chance, []).append(name)
            steps += [step for step, _ in found]
            curves.append(Curve(label=name, steps=[step for step, _ in found], values=[100 * v for _, v in found], points=True))
    for chance, names in chances.items():
        across = np.linspace(min(steps), max(steps), CHANCE_POINTS)
        curves.append(
            Curve(label=f"{', '.join(names)} by chance", steps=across, values=np.full(CHANCE_POINTS, 100 * chance), colour=INK)
        )
    return curves


def _gains(history: History) -> list[Curve]:
    """How much likelier a token is when it could be known than when it could not, of each probe that has both."""
    found = {name: sorted(history.probes.get(f"{name}_gain", {}).items()) for name in CHANCE}
    return [
        Curve(label=name, steps=[step for step, _ in pairs], values=[value for _, value in pairs], points=True)
        for name, pairs in found.items()
        if pairs
    ]


def _norms(history: History) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(file name, title, (key, label) of the curves) of a chart of all whole norms, and one for each kind that has parts."""
    kinds: dict[str, list[str]] = {}
    for key in history.columns:
        if key.startswith("norm/"):
            kind, _, part = key.removeprefix("norm/").partition(".")
            kinds.setdefault(kind if part else "", []).append(key)
    charts = []
    for kind, keys in sorted(kinds.items()):
        shown = _spread(keys)
        labels = [(key, key.removeprefix("norm/").removeprefix(f"{kind}.")) for key in shown]
        title = f"norms of each layer's {kind}" if kind else "norms"
        title += f", {len(shown)} of {len(keys)} layers" if len(shown) < len(keys) else ""
        charts.append((re.sub(r"[^a-z0-9]+", "_", f"norms {kind}".strip().lower()), title, labels))
    return charts


def _spread(names: list[str]) -> list[str]:
    """At most NORMS_SHOWN of them, evenly over the layers."""
    ordered = sorted(names, key=lambda name: [(int(part) if part.isdigit() else -1, part) for part in name.split(".")])
    if len(ordered) <= NORMS_SHOWN:
        return ordered
    return [ordered[round(index * (len(ordered) - 1) / (NORMS_SHOWN - 1))] for index in range(NORMS_SHOWN)]
