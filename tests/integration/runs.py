"""Whole runs for the tests of this folder: their settings, one attempt in a rank of `tests.dist`, and their words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_pipeline.config import DataConfig, SourceConfig
from train.attempt import Attempt
from train.config.model import ModelConfig
from train.config.monitor import MonitorConfig, WandbConfig
from train.config.pretrain import PretrainConfig
from train.config.training import (
    BatchConfig,
    BudgetConfig,
    CheckpointConfig,
    EvaluateConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
)
from train.parallel import ParallelContext
from train.stages.training import train

STEPS, SAVE_EVERY, EVALUATE_EVERY, SEQUENCE = 16, 5, 4, 32

# The same run as words of the command line. Batch ramp, dropout and evaluation are on: each is a way to resume wrongly.
WORDS = (
    "model=gpt2_tiny", "model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.ffn_size=64",
    "model.dropout=0.1", f"data.sequence_length={SEQUENCE}", "batch.sequences=8", "batch.micro_batch=2", "batch.ramp_start=4",
    "batch.ramp_samples=48", f"budget.steps={STEPS}", "schedule.warmup_steps=4", "optim.lr=0.003",
    f"checkpoint.every_steps={SAVE_EVERY}", f"evaluate.every_steps={EVALUATE_EVERY}", "evaluate.max_samples=8",
    "monitor=quiet", "launch.device=cpu", "precision=fp32",
)  # fmt: skip


def settings(
    corpus: Path,
    *,
    zero: int = 1,
    precision: str = "fp32",
    steps: int = STEPS,
    stop_at_step: int | None = None,
    batch: BatchConfig | None = None,
) -> PretrainConfig:
    """The run as its configuration."""
    return PretrainConfig(
        run=RunConfig(name="small", seed=11),
        model=ModelConfig(
            family="gpt2", num_layers=2, hidden_size=32, num_heads=2, ffn_size=64, max_positions=SEQUENCE, vocab_size=300,
            positions="learned", norm="layer", mlp="gelu", bias=True, tied_head=True, dropout=0.1,
        ),
        data=DataConfig(sources=(SourceConfig(path=str(corpus)),), sequence_length=SEQUENCE),
        batch=batch or BatchConfig(sequences=8, micro_batch=2, ramp_start=4, ramp_samples=48),
        budget=BudgetConfig(steps=steps, stop_at_step=stop_at_step),
        optim=OptimConfig(lr=3e-3),
        schedule=ScheduleConfig(warmup_steps=4),
        parallel=ParallelConfig(zero=zero),
        precision=precision,
        checkpoint=CheckpointConfig(every_steps=SAVE_EVERY),
        evaluate=EvaluateConfig(every_steps=EVALUATE_EVERY, max_samples=8),
        monitor=MonitorConfig(console_every_steps=1000, tensorboard=False, wandb=WandbConfig(mode="disabled")),
    )  # fmt: skip


def attempt(
    context: ParallelContext, config: PretrainConfig, run_dir: str, number: int, change: Callable[[], None] | None = None
) -> tuple[str, int]:
    """(state, step) in which one attempt ended. `change` alters the program first; the rank's process ends with it."""
    if change is not None:
        change()
    if context.is_first:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
    context.barrier()
    one = Attempt(run_dir=Path(run_dir), number=number)
    ending, step = train(config, context, one, run={"run_id": "small", "wandb_id": "small"})
    return ending.state, step
