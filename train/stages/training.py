"""A run that trains, put together: what is common to all kinds, around what each of them reads."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conf.compose import to_plain
from conf.errors import UserError
from data_pipeline.loader import SampleSource
from train.attempt import Attempt
from train.checkpoint.manifest import write_durably
from train.checkpoint.store import CheckpointStore
from train.config.changes import check_resume
from train.config.settings import RunSettings
from train.device import measured_cpu_flops, peak_of
from train.engine import Engine
from train.health.requests import Deadline, Requests
from train.health.stragglers import Stragglers
from train.loop import Ending, Examiner, Trainer
from train.metrics import Metrics, NullMetrics, RunIdentity, Throughput
from train.metrics.goodput import resume_goodput
from train.metrics.jsonl import FILE_NAME
from train.model.blueprint import Blueprint
from train.model.float8 import product_line
from train.model.philox import INITIALISATION
from train.model.transformer import Reading, build_layers
from train.optim import OptimizerSpec
from train.outcome import attempt_folder
from train.parallel import ParallelContext
from train.plan import RunPlan, make_plan
from train.precision import bf16_on_cpu
from train.recovery import Recovery
from train.saver import Saver
from train.spike_report import SpikeReporter
from train.state import TrainState, read_interventions


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a kind of run brings to the loop."""

    reading: Reading
    """How its micro-batches are read."""
    loader: SampleSource
    """Its training samples."""
    examiner: Callable[[Engine], Examiner | None]
    """Makes what the model is measured by on its way; None where nothing is."""
    begin: Callable[[Engine, CheckpointStore], None]
    """Puts the first weights into the engine of a fresh run: those of a checkpoint, and initial values for what it lacks."""
    tokenizer_folder: Path
    fingerprint: str
    """Identity of the data."""
    base: Path | None = None
    """The checkpoint that holds what the run does not train; None: it trains all."""
    prepare: Callable[[Engine, CheckpointStore], None] = lambda engine, store: None
    """Finds out what the loaders need of the model that the run begins with; what it leaves in the engine is loaded over."""


def blueprint_of(config: RunSettings, context: ParallelContext) -> Blueprint:
    """What the run's layers are built from on this rank."""
    return Blueprint(
        model=config.model,
        kernels=config.kernels,
        tensor=context.tensor,
        device=context.device,
        dtype=torch.float32 if config.compute_precision == "fp32" else torch.bfloat16,
        float8=config.kernels.fp8_scaling if config.compute_precision == "fp8" else None,
        lora=config.adapter,
        neftune_alpha=config.embedding_noise,
        frozen=config.frozen,
        preference=config.pairs,
    )


def optimizer_of(config: RunSettings) -> OptimizerSpec:
    """How the run's parameters are updated."""
    return OptimizerSpec(settings=config.rates, width_ratio=config.model.width_ratio, compile=config.kernels.compile)


def build(
    config: RunSettings, context: ParallelContext, attempt: Attempt, metrics: Metrics | NullMetrics, *, plan: RunPlan
) -> Trainer:
    """Assemble a run at its newest checkpoint, or at its beginning."""
    material = material_of(config, context, attempt, metrics)
    engine = Engine(
        build_layers(blueprint_of(config, context), material.reading),
        optimizer=optimizer_of(config),
        parallel=config.parallel,
        precision=config.compute_precision,
        micro_batch=config.batch.micro_batch,
        dropout_seed=config.run.seed,
        context=context,
    )
    store = CheckpointStore(
        attempt.run_dir / "checkpoints",
        config=config.checkpoint,
        context=context,
        run_config=config,
        tokenizer_folder=material.tokenizer_folder,
        data_fingerprint=material.fingerprint,
        base=material.base,
    )
    deadline = None if attempt.ends_at is None else Deadline(attempt.ends_at - time.time())
    material.prepare(engine, store)
    return Trainer(
        config=config,
        plan=plan,
        context=context,
        engine=engine,
        loader=material.loader,
        examiner=material.examiner(engine),
        saver=Saver(store, metrics, deadline),
        recovery=Recovery(config.guard, attempt.run_dir, store=store, context=context),
        metrics=metrics,
        requests=Requests(context, attempt.run_dir, attempt.number, deadline),
        spikes=SpikeReporter(
            config=config,
            context=context,
            loader=material.loader,
            tokenizer_folder=material.tokenizer_folder,
            folder=attempt_folder(attempt.run_dir, attempt.number),
        ),
        state=resume(engine, store, config, attempt.run_dir, begin=material.begin),
        stragglers=Stragglers(context, config.monitor.stragglers_every_steps),
        watchdog=attempt.watchdog,
    )


def material_of(config: Any, context: ParallelContext, attempt: Attempt, metrics: Metrics | NullMetrics) -> Material:
    """What the run reads, by its kind."""
    from train.stages import finetune, pretrain

    makers: dict[str, Callable[..., Material]] = {"pretrain": pretrain.material, "finetune": finetune.material}
    return makers[config.stage](config, context, attempt, metrics)


def resume(
    engine: Engine,
    store: CheckpointStore,
    config: RunSettings,
    run_dir: Path,
    *,
    begin: Callable[[Engine, CheckpointStore], None],
) -> TrainState:
    """State of the newest checkpoint that can be trusted, its weights and moments in `engine`.

    Without any a fresh one, and `engine` as `begin` leaves it.
    """
    reader = store.load_newest(engine)
    if reader is None:
        begin(engine, store)
        return TrainState(initialisation=INITIALISATION)
    state = TrainState.from_plain(reader.state)
    state.remember(read_interventions(run_dir))
    for change in check_resume(reader.config, config, str(reader.path)):
        state.adjustments.append({"step": state.step, "field": change.field, "before": change.before, "after": change.after})
    return state


def layout_of(config: RunSettings, plan: RunPlan) -> dict[str, int]:
    """The layout as it is shown with the run."""
    return {
        "world_size": plan.world_size,
        "data_parallel": plan.data_parallel,
        "tensor": config.parallel.tensor,
        "zero": config.parallel.zero,
    }


def note_in_run(run_dir: Path, **values: object) -> None:
    """Write what only the ranks know into run.json: the precision, another Weights & Biases id when the old one is unknown."""
    path = run_dir / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    write_durably(path, json.dumps(record | values, indent=2).encode())


def precision_lines(config: RunSettings, why: str, state: TrainState, device: torch.device) -> list[str]:
    """The precision and why it is that one, what it was before this resume, and what bf16 costs where it is emulated."""
    before = [change for change in state.adjustments if change["field"] == "precision" and change["step"] == state.step]
    lines = [f"precision        {config.precision} ({why})"]
    if before:
        lines[0] += f"; {before[-1]['before']} until step {state.step}"
    if device.type == "cpu" and config.precision != "fp32" and not bf16_on_cpu()[0]:
        bf16, fp32 = (measured_cpu_flops(dtype, seconds=0.1) for dtype in (torch.bfloat16, torch.float32))
        if fp32 > bf16:
            lines.append(
                f"                 bf16 is emulated here: products run at {bf16 / 1e9:.1f} GFLOP/s, in fp32 "
                f"{fp32 / bf16:.0f} times as fast; precision=auto takes fp32"
            )
    return lines


def train(
    config: RunSettings, context: ParallelContext, attempt: Attempt, *, run: dict, why: str = "as asked"
) -> tuple[Ending, int]:
    """Run the training on this rank: how it ended, and at which step.

    `run` is the content of run.json; `why` tells how the precision was settled.
    """
    run_dir = attempt.run_dir
    plan = make_plan(config, context.world_size)
    metrics: Metrics | NullMetrics = NullMetrics()
    if context.is_first:
        identity = RunIdentity(
            name=config.run.name,
            run_id=run["run_id"],
            wandb_id=run["wandb_id"],
            attempt=attempt.number,
            job_type=config.stage,
            group=config.monitor.wandb.group or config.run.name,
            resolved_config=to_plain(config),
            layout=layout_of(config, plan),
            notes=config.run.notes,
        )
        work = plan.flops_per_token_full * plan.total_tokens / context.world_size
        peak = peak_of(context.device, config.compute_precision, work=work)
        print(f"peak             {peak}")
        throughput = Throughput(
            flops_per_token=plan.flops_per_token_full,
            flops_per_token_causal=plan.flops_per_token_causal,
            peak_flops=peak.flops and peak.flops * context.world_size,
        )
        metrics = Metrics(
            config.monitor,
            run_dir,
            identity,
            plan.total_steps,
            throughput=throughput,
            save_wandb_id=lambda wandb_id: note_in_run(run_dir, wandb_id=wandb_id),
        )
    outcome, reason = "crashed", ""
    try:
        trainer = build(config, context, attempt, metrics, plan=plan)
        if context.is_first:
            books = {"step": trainer.state.step, "started": attempt.started, "now": time.time()}
            trainer.goodput = resume_goodput(run_dir / FILE_NAME, **books)
        trainer.saver.mark(trainer.state.step, trainer.goodput)
        for gone in trainer.saver.store.set_aside:
            metrics.alert("checkpoint set aside", f"step {gone.step}: {gone.reason}; it is in {gone.place}", level="error")
        if context.is_first:
            print(*precision_lines(config, why, trainer.state, context.device), sep="\n")
            print(f"attention        {trainer.engine.module.attention_line} (kernels.attention={config.kernels.attention})")
            if config.precision == "fp8":
                print(f"products         {product_line(context.device, config.kernels.fp8_scaling)}")
        ending = trainer.run()
        trainer.saver.close()
        outcome, reason = ending.state, ending.reason
        return ending, trainer.state.step
    except UserError as error:
        outcome, reason = "refused", str(error)
        raise
    finally:
        metrics.close(outcome, reason)
