"""`longhaul bench startup`: how long a run takes from its process's start to its first step, and its parts one by one.

The bare imports and the whole way are timed in processes of their own, interleaved; the median is given. The parts (corpus
check, build, values, load) are those of ranks that start on a larger model, and from their rates follows what 8B and 70B
would take. The last line is JSON.
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
from typing import TYPE_CHECKING

from conf.errors import ConfigError, UserError
from train.initial import configure
from train.model.cost import num_parameters

if TYPE_CHECKING:
    from tools.startup_parts import Part

BARE = "import torch, deepspeed\nimport megatron.core.datasets.indexed_dataset"
LARGE = {"llama_8b": 8, "llama_70b": 64}
"""Models that are extrapolated to, and the ranks that share each."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    data: str = "data/stdlib"
    """Folder of a prepared corpus to start on."""
    repeats: int = 3
    """Processes timed of each kind; the first pair warms the caches and is not counted. 0: the parts alone are measured."""
    model: str = "llama_tiny"
    """Option of the group `model`: of the command that is timed to its first step."""
    large_model: str = "llama_bench"
    """Option of the group `model`: of the parts. A rank needs 16 bytes for each parameter of ZeRO 1, and the checkpoint 12 on
    disk."""
    zero: int = 1
    """ZeRO stage of the parts."""
    precision: str = "fp32"
    """Of the parts: fp32 or bf16."""
    processes: int = 1
    """Ranks of the parts, all on this machine."""
    folder: str | None = None
    """Where the checkpoint of the parts is written; null: the machine's folder for temporary files."""

    def __post_init__(self) -> None:
        problems = []
        if self.repeats < 0:
            problems.append(f"repeats={self.repeats}: must not be negative")
        if self.processes < 1:
            problems.append(f"processes={self.processes}: must be at least 1")
        if problems:
            raise ConfigError(problems)


def run(config: BenchConfig) -> int:
    """Time, print, and end with a line of JSON (on rank 0).

    Raises UserError when a timed process fails.
    """
    from tools.startup_parts import measure  # torch: seconds, and --help needs none of it
    from train.companions import ranks

    with (
        ranks(config.processes, "cpu") as context,
        tempfile.TemporaryDirectory(dir=config.folder, prefix="startup-") as made,
    ):
        parts = measure(config, context, Path(context.from_first(made)))
        if not context.is_first:
            return 0
    bare, full = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(config.repeats and config.repeats + 1):
            imports = _seconds_of([sys.executable, "-W", "ignore", "-c", BARE])
            start = _start_seconds(config, Path(folder), number)
            if number:
                bare.append(imports)
                full.append(start)
                print(f"bare imports {imports:6.2f} s   command to first step {start:6.2f} s", flush=True)
    report: dict[str, object] = {"repeats": config.repeats}
    if bare:
        report |= {
            "bare_imports_seconds": round(statistics.median(bare), 2),
            "first_step_seconds": round(statistics.median(full), 2),
            "beyond_imports_seconds": round(statistics.median(full) - statistics.median(bare), 2),
        }
    print(f"\n{config.large_model}, {config.processes} ranks, ZeRO {config.zero}, {config.precision}; of one rank:")
    for name, part in parts.items():
        times = f"{part.seconds:8.3f} s {part.cpu_seconds:8.3f} CPU s"
        handled = f"{part.amount:>16,.0f} {part.unit:<8} {part.amount / part.seconds / 1e6:>9,.1f} M/s"
        print(f"  {name:<14} {times} {handled}   peak {part.peak_bytes / 2**20:>7,.0f} MiB")
    report["parts"] = {
        name: {
            "seconds": round(part.seconds, 4),
            "cpu_seconds": round(part.cpu_seconds, 4),
            part.unit: int(part.amount),
            "peak_mib": part.peak_bytes >> 20,
        }
        for name, part in parts.items()
    }
    large = {model: _extrapolated(model, num_ranks, parts) for model, num_ranks in LARGE.items()}
    for model, seconds in large.items():
        print(f"  {model} on {LARGE[model]} ranks: " + ", ".join(f"{what} {value:.1f}" for what, value in seconds.items()))
    report["extrapolated"] = large
    print(json.dumps(report))
    return 0


def _extrapolated(model: str, num_ranks: int, parts: dict[str, Part]) -> dict[str, float]:
    """Seconds of what a rank does with its part of a large model's weights, by the rates that were measured here."""
    share = num_parameters(configure([f"model={model}", "budget.steps=2", "schedule.warmup_steps=0"]).model) / num_ranks
    values, load = parts["values"], parts["load"]
    loaded = load.amount / values.amount  # bytes for each parameter: read once to verify, once to load
    return {
        "values seconds": round(share * values.cpu_seconds / values.amount, 2),  # a core draws them
        "load seconds": round(share * loaded * load.seconds / load.amount, 2),
    }


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
