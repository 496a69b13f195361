"""What was found out about a run before anything of it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from train.config.settings import RunSettings

SettingsT = TypeVar("SettingsT", bound=RunSettings)


@dataclass(frozen=True, kw_only=True)
class Findings(Generic[SettingsT]):
    """Of one kind of run, what the launcher has to know."""

    config: SettingsT
    """The settings, with all that follows from the data."""
    fingerprint: str
    """Identity of the data."""
    lines: tuple[str, ...]
    """The data, for a person."""
    train_tokens: int | None
    """Tokens of one epoch."""
    other_data: Callable[[str], str]
    """What to tell a person whose newest checkpoint, so named, was trained on other data."""
    begin: Callable[[], list[str]]
    """Checks what a fresh run begins with, and tells; raises UserError when it does not fit."""
    check_plan: Callable[[int], object]
    """Checks the data against the samples of the whole run; raises ConfigError."""
    make_ready: Callable[[Path], object]
    """Checks the data as data.verify says, and puts into the run's folder what the ranks will read."""
