"""Pretraining: the parts, put together."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from conf.compose import to_plain
from conf.errors import UserError
from data_pipeline.facts import CorpusFacts, inspect_sources
from data_pipeline.loader import Loader
from train.attempt import Attempt
from train.checkpoint.manifest import write_durably
from train.checkpoint.store import CheckpointStore
from train.config.changes import check_resume
from train.config.pretrain import PretrainConfig
from train.device import peak_flops
from train.engine import Engine
from train.health.requests import Deadline, Requests
from train.health.stragglers import Stragglers
from train.held_out import Evaluator
from train.initial import check_initial, initial_folder
from train.loop import Ending, Trainer
from train.metrics import Metrics, NullMetrics, RunIdentity, Throughput
from train.metrics.goodput import resume_goodput
from train.metrics.jsonl import FILE_NAME
from train.model.blueprint import Blueprint
from train.model.transformer import Reading, build_layers
from train.optim import OptimizerSpec
from train.outcome import attempt_folder
from train.parallel import ParallelContext
from train.plan import RunPlan, make_plan
from train.recovery import Recovery
from train.saver import Saver
from train.spike_report import SpikeReporter
from train.state import TrainState, read_interventions


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


def build(config: PretrainConfig, context: ParallelContext, attempt: Attempt, metrics: Metrics | NullMetrics) -> Trainer:
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
        attempt.run_dir / "checkpoints",
        config=config.checkpoint,
        context=context,
        run_config=config,
        tokenizer_folder=corpus.tokenizer_path,
        data_fingerprint=corpus.fingerprint,
    )
    deadline = None if attempt.ends_at is None else Deadline(attempt.ends_at - time.time())
    split = {"seed": config.run.seed, "vocab_size": config.model.vocab_size}
    loader = Loader(config.data, split="train", pin=context.device.type == "cuda", **split)
    evaluator = None
    if config.evaluate.max_samples != 0:
        held_out = Loader(config.data, split="validation", **split)
        evaluator = Evaluator(config, context=context, engine=engine, loader=held_out)
        for reason in evaluator.missing:
            metrics.alert("probe left out", f"{reason}; leave it out of evaluate.probes to be told no more")
    return Trainer(
        config=config,
        plan=plan,
        context=context,
        engine=engine,
        loader=loader,
        evaluator=evaluator,
        saver=Saver(store, metrics, deadline),
        recovery=Recovery(config.guard, attempt.run_dir, store=store, context=context),
        metrics=metrics,
        requests=Requests(context, attempt.run_dir, attempt.number, deadline),
        spikes=SpikeReporter(
            config=config,
            context=context,
            loader=loader,
            tokenizer_folder=corpus.tokenizer_path,
            folder=attempt_folder(attempt.run_dir, attempt.number),
        ),
        state=resume(engine, store, config, attempt.run_dir, corpus=corpus),
        stragglers=Stragglers(context, config.monitor.stragglers_every_steps),
        watchdog=attempt.watchdog,
    )


def resume(engine: Engine, store: CheckpointStore, config: PretrainConfig, run_dir: Path, *, corpus: CorpusFacts) -> TrainState:
    """State of the newest checkpoint that can be trusted, its weights and moments in `engine`.

    Without any a fresh one; then `engine` has the weights of the configuration's initial checkpoint, if it names one.
    """
    reader = store.load_newest(engine)
    if reader is None:
        if config.initial_checkpoint is not None:
            check_initial(config, corpus)  # a job that waited for it was not checked when it was submitted
            store.load_weights(engine, initial_folder(config.initial_checkpoint))
        return TrainState()
    state = TrainState.from_plain(reader.state)
    state.remember(read_interventions(run_dir))
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


def pretrain(config: PretrainConfig, context: ParallelContext, attempt: Attempt, *, run: dict) -> tuple[Ending, int]:
    """Run pretraining on this rank: how it ended, and at which step. `run` is the content of run.json."""
    run_dir = attempt.run_dir
    plan = make_plan(config, context.world_size)
    metrics: Metrics | NullMetrics = NullMetrics()
    if context.is_first:
        identity = RunIdentity(
            name=config.run.name,
            run_id=run["run_id"],
            wandb_id=run["wandb_id"],
            attempt=attempt.number,
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
        trainer = build(config, context, attempt, metrics)
        if context.is_first:
            books = {"step": trainer.state.step, "started": attempt.started, "now": time.time()}
            trainer.goodput = resume_goodput(run_dir / FILE_NAME, **books)
        trainer.saver.mark(trainer.state.step, trainer.goodput)
        for gone in trainer.saver.store.set_aside:
            metrics.alert("checkpoint set aside", f"step {gone.step}: {gone.reason}; it is in {gone.place}", level="error")
        if context.is_first:
            print(f"attention        {trainer.engine.module.attention_line} (kernels.attention={config.kernels.attention})")
        ending = trainer.run()
        trainer.saver.close()
        outcome, reason = ending.state, ending.reason
        return ending, trainer.state.step
    except UserError as error:
        outcome, reason = "refused", str(error)
        raise
    finally:
        metrics.close(outcome, reason)
