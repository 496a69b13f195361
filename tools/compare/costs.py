"""What each subject cost and how far it came: tokens, FLOPs, device time, held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tools.compare.subjects import Subject
from train.config.imported import ImportedConfig
from train.metrics.console import duration
from train.model.adapters import all_shapes, trained_shapes
from train.model.cost import num_parameters, num_values
from train.model.flops import flops_per_token
from train.outcome import last_attempt, read_outcome

UNKNOWN = "-"
LAST_LOSSES = 50  # steps whose mean is shown: the loss of one batch says little
CONVENTIONS = (
    "FLOPs are those of the tokens that count, forward and backward: 6 for each parameter of a matrix product, less where a "
    "part of the model is frozen, and attention in full (PaLM) or only what a causal mask leaves. Device time is the time of "
    "steps, those that had to be done again included, times the ranks of the newest attempt; starting, waiting, saving and "
    "evaluating are not in it. What an imported or initial model had cost before is not known here."
)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Losses of one held-out set, in nats per token."""

    best: float
    best_step: int
    last: float
    last_step: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Figures of one subject; None: not recorded, or never trained here."""

    state: str
    parameters: int
    """Of the model, adapters included."""
    trained_parameters: int | None = None
    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None
    """Training FLOPs, attention counted in full."""
    flops_causal: float | None = None
    ranks: int | None = None
    device: str = UNKNOWN
    """GPU or CPU."""
    computing_seconds: float | None = None
    """Of all steps, those that were lost included."""
    lost_seconds: float | None = None
    goodput: float | None = None
    tokens_per_second: float | None = None
    """Median of the steps."""
    training_loss: float | None = None
    """Mean of the last LAST_LOSSES steps."""
    held_out: dict[str, HeldOut] = field(default_factory=dict)

    @property
    def device_seconds(self) -> float | None:
        """Seconds of all devices together."""
        if self.computing_seconds is None or self.ranks is None:
            return None
        return self.computing_seconds * self.ranks


def cost_of(subject: Subject) -> Cost:
    """What the records, the settings and the checkpoint say."""
    settings = subject.settings
    if isinstance(settings, ImportedConfig):
        return Cost(state="imported", parameters=num_parameters(settings.model))
    model, tokens = settings.model, subject.tokens
    what_trains = {"lora": settings.adapter, "frozen": settings.frozen}
    full, causal = flops_per_token(model, settings.sequence_length, **what_trains)
    productive, lost = subject.newest("seconds_productive"), subject.newest("seconds_lost")
    rates_N = subject.column("tokens_per_second")[1]
    losses_N = subject.column("loss")[1]
    losses_N = losses_N[np.isfinite(losses_N)][-LAST_LOSSES:]
    return Cost(
        state=_state(subject),
        parameters=num_values(all_shapes(model, lora=settings.adapter)),
        trained_parameters=num_values(trained_shapes(model, **what_trains)),
        steps=subject.step,
        tokens=tokens,
        flops=None if tokens is None else float(full) * tokens,
        flops_causal=None if tokens is None else float(causal) * tokens,
        ranks=_ranks(subject),
        device={"cuda": "GPU", "cpu": "CPU"}.get(settings.launch.device, "device"),
        computing_seconds=None if productive is None else productive + (lost or 0.0),
        lost_seconds=lost,
        goodput=subject.newest("goodput"),
        tokens_per_second=float(np.median(rates_N)) if len(rates_N) else None,
        training_loss=float(losses_N.mean()) if len(losses_N) else None,
        held_out=held_out(subject),
    )


def held_out(subject: Subject) -> dict[str, HeldOut]:
    """Name of the held-out set -> its losses; sets without a finite one are left out."""
    found = {}
    for name, figures in subject.evaluations.items():
        finite = {step: loss for step, loss in figures.get("loss", {}).items() if np.isfinite(loss)}
        if finite:
            best_step = min(finite, key=lambda step: (finite[step], step))
            last_step = max(finite)
            found[name] = HeldOut(best=finite[best_step], best_step=best_step, last=finite[last_step], last_step=last_step)
    return found


def _state(subject: Subject) -> str:
    if subject.until is not None or subject.run_dir is None:
        return "a checkpoint"
    attempt = last_attempt(subject.run_dir)
    outcome = read_outcome(subject.run_dir, attempt) if attempt else None
    return outcome.state if outcome else "running, or cut off"


def _ranks(subject: Subject) -> int | None:
    if subject.until is not None and subject.manifest is not None:
        return subject.manifest.layout.get("world_size")
    processes = subject.record.get("processes")
    if isinstance(processes, int):
        return processes
    return None if isinstance(subject.settings, ImportedConfig) else subject.settings.launch.processes


def cost_rows(costs: Sequence[Cost]) -> list[list[str]]:
    """Name and the value of each subject; rows that say nothing of any of them are left out."""
    are_partly_trained = any(cost.trained_parameters not in (None, cost.parameters) for cost in costs)
    rows = [
        ["state", *(cost.state for cost in costs)],
        ["parameters", *(_count(cost.parameters) for cost in costs)],
        *([["of which trained", *(_count(cost.trained_parameters) for cost in costs)]] if are_partly_trained else []),
        ["steps", *(_count(cost.steps) for cost in costs)],
        ["tokens", *(_count(cost.tokens) for cost in costs)],
        ["tokens per parameter", *(_ratio(cost.tokens, cost.parameters) for cost in costs)],
        ["FLOPs, attention in full", *(_large(cost.flops) for cost in costs)],
        ["FLOPs, causal attention", *(_large(cost.flops_causal) for cost in costs)],
        ["ranks", *(_count(cost.ranks) for cost in costs)],
        ["time of steps", *(_span(cost.computing_seconds) for cost in costs)],
        ["of which done again", *(_span(cost.lost_seconds) for cost in costs)],
        [f"{_device(costs)}-hours", *(_hours(cost.device_seconds) for cost in costs)],
        ["goodput", *(UNKNOWN if cost.goodput is None else f"{100 * cost.goodput:.1f} %" for cost in costs)],
        ["tokens/s, median", *(_count(cost.tokens_per_second) for cost in costs)],
        [
            f"training loss, last {LAST_LOSSES}",
            *(UNKNOWN if cost.training_loss is None else f"{cost.training_loss:.4f}" for cost in costs),
        ],
    ]
    for name in dict.fromkeys(name for cost in costs for name in cost.held_out):
        sets = [cost.held_out.get(name) for cost in costs]
        title = f"held-out loss of {name}" if name else "held-out loss"
        rows.append([f"{title}, best", *(UNKNOWN if one is None else f"{one.best:.4f} at {one.best_step:,}" for one in sets)])
        rows.append([f"{title}, last", *(UNKNOWN if one is None else f"{one.last:.4f} at {one.last_step:,}" for one in sets)])
    return [row for row in rows if any(value != UNKNOWN for value in row[1:])]


def _device(costs: Sequence[Cost]) -> str:
    kinds = {cost.device for cost in costs} - {UNKNOWN}
    return kinds.pop() if len(kinds) == 1 else "device"


def _count(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _large(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3g}"


def _ratio(value: float | None, of: float) -> str:
    return UNKNOWN if value is None else f"{value / of:.2f}"


def _span(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else duration(seconds)


def _hours(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{seconds / 3600:,.3g}" if seconds < 360_000 else f"{seconds / 3600:,.0f}"
