"""Pretraining: the parts, put together."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from conf.compose import to_plain
from conf.errors import UserError
from data_pipeline.facts import inspect_sources
from data_pipeline.loader import Loader
from train.checkpoint.manifest import write_durably
from train.checkpoint.store import CheckpointStore
from train.config.changes import check_resume
from train.config.pretrain import PretrainConfig
from train.device import peak_flops
from train.engine import Engine
from train.health.stop import StopSignal
from train.loop import Ending, Trainer, TrainState
from train.metrics import Metrics, NullMetrics, RunIdentity, Throughput
from train.model.blueprint import Blueprint
from train.model.transformer import Reading, build_layers
from train.optim import OptimizerSpec
from train.parallel import ParallelContext
from train.plan import RunPlan, make_plan


def blueprint_of(config: PretrainConfig, context: ParallelContext) -> Blueprint:
    """What the run's layers are built from on this rank."""
    return Blueprint(
        model=config.model,
        kernels=config.kernels,
        tensor=context.tensor,
        device=context.device,
        dtype=torch.float32 if config.precision == "fp32" else torch.bfloat16,
        float8=config.kernels.fp8_scaling if config.precision == "fp8" else None,
    )


def optimizer_of(config: PretrainConfig) -> OptimizerSpec:
    """How the run's parameters are updated."""
    return OptimizerSpec(settings=config.optim, width_ratio=config.model.width_ratio, compile=config.kernels.compile)


def build(config: PretrainConfig, context: ParallelContext, run_dir: Path, metrics: Metrics | NullMetrics) -> Trainer:
    """Assemble a run at its newest checkpoint, or at its beginning."""
    plan = make_plan(config, context.world_size)
    corpus = inspect_sources(config.data)
    reading = Reading(sequence_length=config.data.sequence_length, document_mask=config.data.document_mask)
    engine = Engine(
        build_layers(blueprint_of(config, context), reading, seed=config.run.seed),
        optimizer=optimizer_of(config),
        parallel=config.parallel,
        precision=config.precision,
        micro_batch=config.batch.micro_batch,
        dropout_seed=config.run.seed,
        context=context,
    )
    store = CheckpointStore(
        run_dir / "checkpoints",
        config=config.checkpoint,
        context=context,
        run_config=config,
        tokenizer_folder=corpus.tokenizer_path,
        data_fingerprint=corpus.fingerprint,
    )
    split = {"seed": config.run.seed, "vocab_size": config.model.vocab_size}
    return Trainer(
        config=config,
        plan=plan,
        context=context,
        engine=engine,
        loader=Loader(config.data, split="train", pin=context.device.type == "cuda", **split),
        held_out=None if config.evaluate.max_samples == 0 else Loader(config.data, split="validation", **split),
        store=store,
        metrics=metrics,
        stop=StopSignal(context),
        state=resume(engine, store, config),
    )


def resume(engine: Engine, store: CheckpointStore, config: PretrainConfig) -> TrainState:
    """State of the newest checkpoint, its weights and moments in `engine`; a fresh state when there is none."""
    reader = store.load_newest(engine)
    if reader is None:
        return TrainState()
    state = TrainState(**reader.state)
    for change in check_resume(reader.config, config, str(reader.path)):
        state.adjustments.append({"step": state.step, "field": change.field, "before": change.before, "after": change.after})
    return state


def layout_of(config: PretrainConfig, plan: RunPlan) -> dict[str, int]:
    """The layout as it is shown with the run."""
    return {
        "world_size": plan.world_size,
        "data_parallel": plan.data_parallel,
        "tensor": config.parallel.tensor,
        "zero": config.parallel.zero,
    }


def keep_wandb_id(run_dir: Path, wandb_id: str) -> None:
    """Write another Weights & Biases id into run.json: the service no longer knew the old one."""
    path = run_dir / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    write_durably(path, json.dumps(record | {"wandb_id": wandb_id}, indent=2).encode())


def pretrain(config: PretrainConfig, context: ParallelContext, run_dir: Path, *, attempt: int, run: dict) -> tuple[Ending, int]:
    """Run pretraining on this rank: how it ended, and at which step. `run` is the content of run.json."""
    plan = make_plan(config, context.world_size)
    metrics: Metrics | NullMetrics = NullMetrics()
    if context.is_first:
        identity = RunIdentity(
            name=config.run.name,
            run_id=run["run_id"],
            wandb_id=run["wandb_id"],
            attempt=attempt,
            job_type="pretrain",
            group=config.monitor.wandb.group or config.run.name,
            resolved_config=to_plain(config),
            layout=layout_of(config, plan),
            notes=config.run.notes,
        )
        peak = peak_flops(context.device, config.precision)
        throughput = Throughput(
            flops_per_token=plan.flops_per_token_full,
            flops_per_token_causal=plan.flops_per_token_causal,
            peak_flops=peak and peak * context.world_size,
        )
        metrics = Metrics(
            config.monitor,
            run_dir,
            identity,
            plan.total_steps,
            throughput=throughput,
            save_wandb_id=lambda wandb_id: keep_wandb_id(run_dir, wandb_id),
        )
    outcome, reason = "crashed", ""
    try:
        trainer = build(config, context, run_dir, metrics)
        if context.is_first:
            print(f"attention        {trainer.engine.module.attention_line} (kernels.attention={config.kernels.attention})")
        ending = trainer.run()
        outcome, reason = ending.state, ending.reason
        return ending, trainer.state.step
    except UserError as error:
        outcome, reason = "refused", str(error)
        raise
    finally:
        metrics.close(outcome, reason)
