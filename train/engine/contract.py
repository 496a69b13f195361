"""What goes into the engine and what comes out of it, as plain as the loop wants it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class Batch(Protocol):
    """What the engine reads of a micro-batch; shapes as in `data_pipeline.loader.MicroBatch`."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    document_bounds: Tensor
    references: Tensor | None
    target_tokens: int


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step over all ranks. `grad_norm` is taken before clipping; `skipped` means no weight was touched."""

    loss_sum: float
    target_tokens: int
    grad_norm: float
    skipped: bool
    busy_seconds: float
    """What this rank computed up to the end of its last forward pass, without waiting for the sums over the ranks."""
    figures: dict[str, float] = field(default_factory=dict)
    """Further sums over the targets, by the names that the head gives them."""

    @property
    def loss(self) -> float:
        """Mean loss of a target token, in nats."""
        return self.loss_sum / self.target_tokens if self.target_tokens else math.nan

    @property
    def means(self) -> dict[str, float]:
        """The figures of a mean target."""
        return {name: value / self.target_tokens if self.target_tokens else math.nan for name, value in self.figures.items()}


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Sums over one micro-batch of this rank."""

    loss_sum: float
    target_tokens: int
    figures: tuple[float, ...] = ()
    """Further sums, in the order of the head's names for them."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model expects at P places."""

    log_probability: Tensor
    """fp32 [P, O] of the ids that were asked for."""
    likeliest: Tensor
    """int64 [P]: the likeliest id of the vocabulary."""
