"""One try at a run, as its ranks know it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from train.health.watchdog import Silent, Watchdog


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Where the run is kept, which try this is, since when and until when it may last, and who watches over it."""

    run_dir: Path
    number: int
    started: float = field(default_factory=time.time)
    """Unix seconds."""
    ends_at: float | None = None
    """Unix seconds at which it will be ended from outside; None: never."""
    watchdog: Watchdog | Silent = field(default_factory=Silent)
    """Is told what the rank begins."""
