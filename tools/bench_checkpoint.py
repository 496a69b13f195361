"""`longhaul bench checkpoint`: how long a save holds the training up, and a load, against a plain write of as many bytes.

The last line is JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from conf.errors import ConfigError, UserError
from train.checkpoint.manifest import folder_of
from train.config.model import ModelConfig
from train.config.pretrain import PretrainConfig
from train.config.training import BudgetConfig, CheckpointConfig, OptimConfig, ParallelConfig


@dataclass(frozen=True, kw_only=True)
class CheckpointBenchConfig:
    model: ModelConfig
    """Shape of the model whose weights and moments are saved."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the state lies on the ranks."""
    folder: str | None = None
    """Where to write, on the file system that is to be measured; null: the machine's folder for temporary files."""
    processes: int = 1
    """Ranks, all on this machine."""
    rounds: int = 5
    """Times that everything is done; the median counts."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}: must be at least 1" for name in ("processes", "rounds") if getattr(self, name) < 1
        ]
        if self.model.vocab_size is None:
            problems.append("model.vocab_size=null: give the size of the vocabulary")
        if problems:
            raise ConfigError(problems)


def run(config: CheckpointBenchConfig) -> int:
    """Time, print, and end with a line of JSON (on rank 0)."""
    from train.checkpoint.store import CheckpointStore
    from train.companions import ranks
    from train.engine import Engine
    from train.model.blueprint import Blueprint
    from train.model.transformer import Reading, build_layers
    from train.optim import OptimizerSpec
    from train.precision import resolve_precision

    precision = resolve_precision("auto", "cpu").precision
    layout = {"tensor_parallel": config.parallel.tensor, "sequence_parallel": config.parallel.sequence_parallel}
    with ranks(config.processes, "cpu", **layout) as context, tempfile.TemporaryDirectory(dir=config.folder) as made:
        root = Path(context.from_first(made))
        tokenizer = root / "tokenizer"
        if context.is_first:
            tokenizer.mkdir()
            (tokenizer / "tokenizer.json").write_text("{}")
        engine = Engine(
            build_layers(
                Blueprint(model=config.model, tensor=context.tensor), Reading(sequence_length=64, document_mask=False)
            ),
            optimizer=OptimizerSpec(settings=OptimConfig()),
            parallel=config.parallel,
            precision=precision,
            micro_batch=1,
            dropout_seed=1,
            context=context,
        )
        engine.initialise(config.model, seed=1)
        store = CheckpointStore(
            root / "checkpoints",
            config=CheckpointConfig(keep_last=1),
            context=context,
            run_config=PretrainConfig(
                model=config.model, budget=BudgetConfig(steps=1), parallel=config.parallel, precision=precision
            ),
            tokenizer_folder=tokenizer,
            data_fingerprint="bench",
        )
        seconds: dict[str, list[float]] = {"blocked": [], "save": [], "load": [], "plain": []}
        for number in range(1, config.rounds + 1):
            context.barrier()
            started = time.perf_counter()
            store.save(engine, step=number, tokens=0, state={"updates": 0})
            store.before_update()
            seconds["blocked"].append(time.perf_counter() - started)
            result = store.finish()
            if result.problem is not None:
                raise UserError(f"folder={config.folder}: {result.problem}")
            seconds["save"].append(time.perf_counter() - started)
            path = folder_of(store.root, number)
            started = time.perf_counter()
            store.load_newest(engine)
            seconds["load"].append(time.perf_counter() - started)
            written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            seconds["plain"].append(_plain_write(root / f"plain-{context.rank}", written // config.processes))
            if context.is_first:
                line = ", ".join(f"{what} {times[-1]:.2f} s" for what, times in seconds.items())
                print(f"round {number}/{config.rounds}: {line}", flush=True)
        store.close()
        medians = {what: statistics.median(times) for what, times in seconds.items()}
        if context.is_first:
            report = {f"{what}_seconds": round(value, 3) for what, value in medians.items()}
            report |= {
                "bytes": written,
                "save_gb_per_second": round(written / medians["save"] / 1e9, 3),
                "save_times_plain_write": round(medians["save"] / medians["plain"], 2),
            }
            print(json.dumps(report))
    return 0


def _plain_write(path: Path, size: int) -> float:
    """Seconds to write `size` bytes and have them on the disk."""
    block = memoryview(os.urandom(1 << 20))
    started = time.perf_counter()
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: min(len(block), size - start)])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds
