"""The curves of all subjects over one another: one chart for each figure, each subject in its own colour."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tools.compare.subjects import Subject
from tools.curves import Chart, Curve

STEP, TOKENS, SECONDS = "step", "tokens", "seconds_productive"
UNITS_OF_TIME = ((2 * 86_400, 86_400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))
PLACE = {
    "attempt", "step", "samples", "tokens", "time", "seconds", "probe_seconds", "target_tokens", "target_bytes",
}  # fmt: skip
"""Fields of an evaluation that say where and of how much, not how well."""
UNITS = {"loss": "nats per token"}
AGAIN = {"perplexity"}
"""Figures that are another one in other words."""


def make_charts(subjects: Sequence[Subject]) -> list[Chart]:
    """The charts for which any subject has values.

    Of subjects with different tokenizers the loss of a token is not of one thing, so bits per byte are drawn as well, where
    they were recorded.
    """
    losses = [
        _chart(subjects, "loss", title="training loss", unit="nats per token", across=across)
        for across in (TOKENS, STEP, SECONDS)
    ]
    others = [
        _chart(subjects, "lr", title="learning rate"),
        _chart(subjects, "tokens_per_second", title="throughput", unit="tokens/s", large=True),
        _chart(subjects, "grad_norm", title="gradient norm before clipping", logarithmic=True),
    ]
    return [chart for chart in (*losses, *_evaluated(subjects), *others) if chart.curves]


def have_one_tokenizer(subjects: Sequence[Subject]) -> bool:
    """Whether nothing speaks against it: a hash that is unknown does not."""
    return len({subject.tokenizer_hash for subject in subjects} - {None}) < 2


def _chart(
    subjects: Sequence[Subject],
    name: str,
    *,
    title: str,
    unit: str = "",
    across: str = STEP,
    large: bool = False,
    logarithmic: bool = False,
) -> Chart:
    """One field of the training records over another, or over the steps."""
    curves = [(subject, *_series(subject, name, across)) for subject in subjects]
    divisor, axis = 1.0, across
    if across == SECONDS:
        longest = max((float(places_N[-1]) for _, places_N, _ in curves if len(places_N)), default=0.0)
        divisor, axis = next((size, f"{unit} of steps that count") for least, size, unit in UNITS_OF_TIME if longest >= least)
    return Chart(
        name=name if across == STEP else f"{name}_{across}",
        title=title,
        unit=unit,
        curves=[_curve(subject, places_N / divisor, values_N) for subject, places_N, values_N in curves if len(values_N)],
        logarithmic=logarithmic,
        large=large,
        across=axis,
        large_across=across == TOKENS,
    )


def _series(subject: Subject, name: str, across: str) -> tuple[np.ndarray, np.ndarray]:
    """Finite values of a field and where they stand on the axis; nothing where that was not recorded."""
    steps_N, values_N = subject.column(name)
    if across == STEP:
        places_N = steps_N.astype(float)
    else:
        known_N, wanted_N = subject.column(across)
        both_N = np.isin(steps_N, known_N)
        steps_N, values_N = steps_N[both_N], values_N[both_N]
        places_N = wanted_N[np.searchsorted(known_N, steps_N)].astype(float) if len(known_N) else np.empty(0)
    finite_N = np.isfinite(values_N) & np.isfinite(places_N)
    return places_N[finite_N], values_N[finite_N]


def _curve(subject: Subject, places: Sequence[float], values: Sequence[float], *, points: bool = False) -> Curve:
    return Curve(label=subject.label, steps=places, values=values, colour=subject.colour, points=points)


def _evaluated(subjects: Sequence[Subject]) -> list[Chart]:
    """A chart for each figure of each held-out set and probe."""
    left_out = PLACE | AGAIN | ({"bits_per_byte"} if have_one_tokenizer(subjects) else set())
    named = dict.fromkeys(
        (name, figure)
        for subject in subjects
        for name, figures in sorted(subject.evaluations.items())
        for figure in figures
        if figure not in left_out
    )
    charts = []
    for name, figure in named:
        axis = TOKENS if all(TOKENS in subject.evaluations.get(name, {TOKENS: {}}) for subject in subjects) else STEP
        curves = [
            curve
            for subject in subjects
            if (curve := _evaluation_curve(subject, subject.evaluations.get(name, {}), figure, axis))
        ]
        charts.append(
            Chart(
                name=f"evaluation_{len(charts)}_{re.sub(r'[^a-z0-9]+', '_', f'{name} {figure}'.lower()).strip('_')}",
                title=_title(name, figure),
                unit=UNITS.get(figure, ""),
                curves=curves,
                across=axis,
                large_across=axis == TOKENS,
            )
        )
    return charts


def _title(name: str, figure: str) -> str:
    if figure.startswith("probe/"):
        probe, _, loss = figure.removeprefix("probe/").partition("_")
        return f"probe {probe}, {loss or 'share of right answers'}"
    told = figure.replace("_", " ")
    return f"{told} of {name}" if name else f"held-out {told}"


def _evaluation_curve(subject: Subject, figures: dict[str, dict[int, float]], figure: str, axis: str) -> Curve | None:
    """None without a finite value."""
    values = {step: value for step, value in sorted(figures.get(figure, {}).items()) if np.isfinite(value)}
    if axis == TOKENS:
        values = {step: value for step, value in values.items() if step in figures[TOKENS]}
        places = [figures[TOKENS][step] for step in values]
    else:
        places = [float(step) for step in values]
    return _curve(subject, places, list(values.values()), points=True) if values else None
