"""`longhaul bench startup`: how long a run takes from its process's start to its first step, against the bare imports.

Each is timed in a process of its own, interleaved, and the median is given. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from conf.errors import ConfigError, UserError

BARE = "import torch, deepspeed\nimport megatron.core.datasets.indexed_dataset"


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    data: str = "data/stdlib"
    """Folder of a prepared corpus to start on."""
    repeats: int = 3
    """Processes timed of each kind; the first pair warms the caches and is not counted."""
    model: str = "llama_tiny"
    """Option of the group `model`."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError([f"repeats={self.repeats}: must be at least 1"])


def run(config: BenchConfig) -> int:
    """Time, print, and end with a line of JSON.

    Raises UserError when a timed process fails.
    """
    bare, full = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(config.repeats + 1):
            imports = _seconds_of([sys.executable, "-W", "ignore", "-c", BARE])
            start = _start_seconds(config, Path(folder), number)
            if number:
                bare.append(imports)
                full.append(start)
                print(f"bare imports {imports:6.2f} s   command to first step {start:6.2f} s", flush=True)
    report = {
        "bare_imports_seconds": round(statistics.median(bare), 2),
        "first_step_seconds": round(statistics.median(full), 2),
        "beyond_imports_seconds": round(statistics.median(full) - statistics.median(bare), 2),
        "repeats": config.repeats,
    }
    print(json.dumps(report))
    return 0


def _seconds_of(command: list[str]) -> float:
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"{' '.join(command[:3])} ... failed:\n{result.stderr[-2000:]}")
    return time.perf_counter() - started


def _start_seconds(config: BenchConfig, folder: Path, number: int) -> float:
    """Seconds from the command's start to the end of its first step, by the time that step's metrics line bears."""
    words = [
        f"model={config.model}", f"data.sources=[{{path: {config.data}}}]", "data.sequence_length=64",
        "batch.sequences=1", "batch.micro_batch=1", "budget.steps=1", "schedule.warmup_steps=0", "monitor=quiet",
        "evaluate.max_samples=1", f"run.folder={folder}", f"run.name=start-{number}",
    ]  # fmt: skip
    started = time.time()
    _seconds_of([sys.executable, "-P", "-m", "tools.cli", "pretrain", *words])
    metrics = folder / f"start-{number}" / "metrics.jsonl"
    first = json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])
    return float(first["time"]) - started
