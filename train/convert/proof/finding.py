"""What a check found, and the limits that the checks hold it against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

LOGITS_TOLERANCE = 1e-4
"""Largest difference of a logit, where logits are of order one; of larger ones, times their root mean square."""
LOSS_TOLERANCE = 1e-4
"""Largest difference of the mean loss of a target, in nats; of a perplexity, relative."""

Figures: TypeAlias = dict[str, float | int | str | list[str]]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check: what was measured, and what is wrong (empty: it passed)."""

    name: str
    figures: Figures = field(default_factory=dict)
    problems: tuple[str, ...] = ()
