"""Fine-tuning runs for the tests of this folder: rows that a tiny model can learn, and an attempt in a rank of `tests.dist`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data_pipeline.rows_config import RowsConfig
from data_pipeline.task_config import TaskConfig, TaskSource
from tests.unit.convert.checkpoints import LLAMA, write_checkpoint
from train.attempt import Attempt
from train.checkpoint.manifest import read_manifest
from train.checkpoint.settings import read_settings
from train.config.finetune import FinetuneConfig, ScoringConfig
from train.config.monitor import MonitorConfig, WandbConfig
from train.config.training import (
    BatchConfig,
    BudgetConfig,
    CheckpointConfig,
    EvaluateConfig,
    LaunchConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
)
from train.launch import settle
from train.parallel import ParallelContext
from train.stages.training import train

MODEL = replace(LLAMA, vocab_size=300, dropout=0.1)
ANIMALS, TOOLS = ("cat", "dog", "owl", "fox"), ("saw", "axe", "peg", "awl")


def base(folder: Path, corpus: Path) -> Path:
    """A checkpoint of random weights with the corpus's tokenizer."""
    return write_checkpoint(folder / "base", MODEL, corpus=corpus)


def labelled_file(folder: Path, *, rows: int = 160, seed: int = 0) -> Path:
    """Rows of a few words, an animal or a tool among them, which is the label."""
    draw = random.Random(seed)
    path = folder / f"labelled-{seed}.jsonl"
    lines = []
    for number in range(rows):
        kind, words = draw.choice((("animal", ANIMALS), ("tool", TOOLS)))
        others = [draw.choice("abcdefgh") * draw.randrange(1, 6) for _ in range(draw.randrange(0, 5))]
        place = draw.randrange(len(others) + 1)
        text = " ".join([*others[:place], draw.choice(words), *others[place:], str(number % 7)])
        lines.append(json.dumps({"text": text, "label": kind}))
    path.write_text("\n".join(lines) + "\n")
    return path


def written_file(folder: Path, *, rows: int = 120, seed: int = 0) -> Path:
    """Rows whose answer is their last word."""
    draw = random.Random(seed)
    path = folder / f"written-{seed}.jsonl"
    lines = []
    for _ in range(rows):
        words = [draw.choice((*ANIMALS, *TOOLS)) for _ in range(draw.randrange(1, 6))]
        lines.append(json.dumps({"prompt": " ".join(words) + " >", "completion": words[-1]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def pairs_file(folder: Path, *, rows: int = 120, seed: int = 0) -> Path:
    """Pairs whose shorter answer is preferred: one animal or tool, and several of them."""
    draw = random.Random(seed)
    path = folder / f"pairs-{seed}.jsonl"
    lines = []
    for _ in range(rows):
        prompt = " ".join(draw.choice((*ANIMALS, *TOOLS)) for _ in range(draw.randrange(1, 4)))
        words = [draw.choice((*ANIMALS, *TOOLS)) for _ in range(draw.randrange(2, 4))]
        lines.append(json.dumps({"prompt": f"{prompt} >", "chosen": f" {words[0]}", "rejected": f" {' '.join(words)}"}))
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(
    checkpoint: Path,
    rows: Path,
    *,
    kind: str = "classification",
    zero: int = 1,
    steps: int = 12,
    stop_at_step: int | None = None,
    **changes: object,
) -> FinetuneConfig:
    """The run as its configuration, before its rows are looked into."""
    metrics = ("rouge",) if kind == "generation" else ()
    config = FinetuneConfig(
        run=RunConfig(name="small", seed=11),
        model=read_settings(checkpoint, read_manifest(checkpoint)).model,
        initial_checkpoint=str(checkpoint),
        task=TaskConfig(kind=kind, name=kind, data=(TaskSource(path=str(rows)),), metrics=metrics, max_new_tokens=6),
        data=RowsConfig(sequence_length=32, validation_fraction=0.2),
        batch=BatchConfig(sequences=8, micro_batch=2),
        budget=BudgetConfig(steps=steps, stop_at_step=stop_at_step),
        optim=OptimConfig(lr=3e-3, weight_decay=0.0),
        parallel=ParallelConfig(zero=zero),
        precision="fp32",
        checkpoint=CheckpointConfig(every_steps=5, keep_last=1, keep_best=1),
        evaluate=EvaluateConfig(every_steps=4, probes=()),
        scoring=ScoringConfig(max_rows=None if kind == "classification" else 8),
        monitor=MonitorConfig(console_every_steps=1000, tensorboard=False, wandb=WandbConfig(mode="disabled")),
        launch=LaunchConfig(device="cpu"),
    )
    return replace(config, **changes)


def ready(config: FinetuneConfig, run_dir: Path) -> FinetuneConfig:
    """The run's folder with its rows, as the launcher makes it; and the configuration with all that follows from them."""
    findings = settle(replace(config, run=replace(config.run, folder=str(run_dir.parent), name=run_dir.name)))
    findings.begin()
    run_dir.mkdir(parents=True, exist_ok=True)
    findings.make_ready(run_dir)
    return findings.config


def attempt(
    context: ParallelContext, config: FinetuneConfig, run_dir: str, number: int, change: Callable[[], None] | None = None
) -> tuple[str, int]:
    """(state, step) in which one attempt ended. `change` alters the program first; the rank's process ends with it."""
    if change is not None:
        change()
    one = Attempt(run_dir=Path(run_dir), number=number)
    ending, step = train(config, context, one, run={"run_id": "small", "wandb_id": "small"})
    return ending.state, step
