"""RunPlan: all that follows from the configuration, the corpus and the world size. Torch-free: a login node prints it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from conf.errors import ConfigError
from train.config.settings import RunSettings
from train.model import cost
from train.model.adapters import all_shapes, trained_shapes
from train.model.flops import flops_per_token


@dataclass(frozen=True, kw_only=True)
class BatchRamp:
    """Global batch, in sequences, as a function of the samples consumed so far."""

    full: int
    start: int
    increment: int
    samples: int

    def at(self, consumed_samples: int) -> int:
        """Sequences of the step that begins after `consumed_samples`."""
        if self.samples == 0 or consumed_samples >= self.samples:
            return self.full
        stages = (self.full - self.start) // self.increment
        return self.start + self.increment * (consumed_samples * stages // self.samples)

    def sizes(self) -> list[int]:
        """Every batch size that occurs."""
        return list(range(self.start, self.full + 1, self.increment)) if self.samples else [self.full]


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do: sizes of its steps, its end, its cost. Frozen; the same on every rank."""

    world_size: int
    data_parallel: int
    micro_batch: int
    sequence_length: int
    ramp: BatchRamp
    total_steps: int
    total_samples: int
    warmup_samples: int
    parameters: int
    """Of the model, adapters included."""
    trained_parameters: int
    flops_per_token_full: int
    flops_per_token_causal: int
    memory: cost.MemoryEstimate

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step once the ramp is over."""
        return self.ramp.full * self.sequence_length

    @property
    def total_tokens(self) -> int:
        """Tokens that the whole run reads."""
        return self.total_samples * self.sequence_length

    def batch_at(self, consumed_samples: int) -> int:
        """Sequences of the step that begins after `consumed_samples`."""
        return self.ramp.at(consumed_samples)

    def micro_batches_at(self, consumed_samples: int) -> int:
        """Micro-batches that each rank runs in the step that begins after `consumed_samples`."""
        return self.batch_at(consumed_samples) // (self.micro_batch * self.data_parallel)


def make_plan(config: RunSettings, world_size: int) -> RunPlan:
    """Work out the plan of `config` on `world_size` ranks.

    Raises ConfigError when a batch cannot be divided among the ranks, or the schedule's parts do not fit into the budget.
    """
    tensor = config.parallel.tensor
    if world_size % tensor:
        raise ConfigError([f"parallel.tensor={tensor}: must divide the {world_size} processes; change it or launch.processes"])
    data_parallel = world_size // tensor
    batch = config.batch
    ramp = BatchRamp(
        full=batch.sequences,
        start=batch.ramp_start or batch.sequences,
        increment=batch.ramp_increment or batch.ramp_start or batch.sequences,
        samples=batch.ramp_samples,
    )
    sequence_length = config.sequence_length
    warmup_steps = config.schedule.warmup_steps
    if config.schedule.warmup_fraction is not None:
        warmup_steps = round(config.schedule.warmup_fraction * _walk(config, ramp, 0)[0])
    total_steps, total_samples, warmup_samples = _walk(config, ramp, warmup_steps)
    problems = _division_problems(config, ramp, data_parallel)
    problems += _rule_problems(config)
    problems += _schedule_problems(config, total_steps, total_samples, warmup_samples)
    if problems:
        raise ConfigError(problems)
    trained = trained_shapes(config.model, lora=config.adapter, frozen=config.frozen)
    full, causal = flops_per_token(config.model, sequence_length, lora=config.adapter, frozen=config.frozen)
    return RunPlan(
        world_size=world_size,
        data_parallel=data_parallel,
        micro_batch=batch.micro_batch,
        sequence_length=sequence_length,
        ramp=ramp,
        total_steps=total_steps,
        total_samples=total_samples,
        warmup_samples=warmup_samples,
        parameters=cost.num_values(all_shapes(config.model, lora=config.adapter)),
        trained_parameters=cost.num_values(trained),
        flops_per_token_full=full,
        flops_per_token_causal=causal,
        memory=cost.memory_per_rank(
            config.model,
            micro_tokens=batch.micro_batch * sequence_length,
            data_parallel=data_parallel,
            tensor_parallel=tensor,
            zero=config.parallel.zero,
            bytes_per_value=_bytes_per_value(config),
            kernels=config.kernels,
            trained=cost.Trained(shapes=trained, muon=config.optim.kind == "muon"),
        ),
    )


def _bytes_per_value(config: RunSettings) -> int:
    """Of a weight or an activation. Not settled yet, auto is what it is on most machines: bf16 on GPUs, fp32 on CPUs."""
    unsettled = config.precision == "auto" and config.launch.device == "cpu"
    return 4 if config.precision == "fp32" or unsettled else 2


def _rule_problems(config: RunSettings) -> list[str]:
    """Rules of the optimizer that fit no parameter that it changes."""
    names = list(trained_shapes(config.model, lora=config.adapter, frozen=config.frozen))
    return [
        f"optim.rules[{number}].pattern={rule.pattern}: fits no parameter that is trained; they are called {names[0]}, "
        f"{names[len(names) // 2]}, {names[-1]} and so on"
        for number, rule in enumerate(config.optim.rules)
        if not any(fnmatchcase(name, rule.pattern) for name in names)
    ]


def _division_problems(config: RunSettings, ramp: BatchRamp, data_parallel: int) -> list[str]:
    """Batch sizes of the run that do not come out even."""
    per_pass = config.batch.micro_batch * data_parallel
    uneven = [size for size in ramp.sizes() if size % per_pass]
    if not uneven:
        return []
    reason = f"a multiple of batch.micro_batch={config.batch.micro_batch} x {data_parallel} data-parallel ranks = {per_pass}"
    if ramp.full in uneven:
        return [
            f"batch.sequences={ramp.full}: must be {reason}; change batch.sequences, batch.micro_batch or the number of "
            f"processes"
        ]
    few = f"{', '.join(map(str, uneven[:3]))}{', ...' if len(uneven) > 3 else ''}"
    return [
        f"batch.ramp_start={ramp.start}: in steps of {ramp.increment} the ramp passes through {few} sequences, and each "
        f"size must be {reason}; change batch.ramp_start or batch.ramp_increment"
    ]


def _schedule_problems(config: RunSettings, total_steps: int, total_samples: int, warmup_samples: int) -> list[str]:
    """Parts of the schedule that are longer than the run, which is known only here when the budget is in tokens."""
    schedule = config.schedule
    if warmup_samples > total_samples:
        return [
            f"schedule.warmup_steps={schedule.warmup_steps}: must not exceed the run's {total_steps} steps; shorten the "
            f"warm-up or raise the budget"
        ]
    if schedule.kind == "wsd" and schedule.decay_fraction * total_samples > total_samples - warmup_samples:
        return [
            f"schedule.decay_fraction={schedule.decay_fraction}: the decay begins before the warm-up of "
            f"{schedule.warmup_steps} steps has ended, in a run of {total_steps} steps; it can be at most "
            f"{(total_samples - warmup_samples) / total_samples:.3f}, or shorten schedule.warmup_steps"
        ]
    return []


def _walk(config: RunSettings, ramp: BatchRamp, warmup_steps: int) -> tuple[int, int, int]:
    """(total steps, total samples, samples of the warm-up): the ramp step by step, the rest in closed form."""
    target_steps = config.budget.steps
    target_samples = None
    if config.budget.tokens is not None:
        target_samples = -(-config.budget.tokens // config.sequence_length)

    def reached(steps: int, samples: int) -> bool:
        if target_steps is not None:
            return steps >= target_steps
        assert target_samples is not None
        return samples >= target_samples

    steps = samples = 0
    warmup_samples = 0 if warmup_steps == 0 else None
    while samples < ramp.samples and not reached(steps, samples):
        samples += ramp.at(samples)
        steps += 1
        if steps == warmup_steps:
            warmup_samples = samples
    if warmup_samples is None:
        warmup_samples = samples + (warmup_steps - steps) * ramp.full
    if not reached(steps, samples):
        left = target_steps - steps if target_steps is not None else -(-(target_samples - samples) // ramp.full)
        steps += left
        samples += left * ramp.full
    return steps, samples, warmup_samples


def describe(plan: RunPlan, config: RunSettings, *, precision: str, train_tokens: int | None = None) -> list[str]:
    """The plan as human-readable lines. `precision`: the one expected, in words."""
    passes = plan.micro_batches_at(plan.total_samples)
    memory, gib = plan.memory, cost.GIB
    lines = [
        f"ranks            {plan.world_size} ({plan.data_parallel} data-parallel x {config.parallel.tensor} tensor-parallel"
        f"{' with rows split' if config.parallel.sequence_parallel else ''}), ZeRO {config.parallel.zero}, "
        f"{precision}",
        f"model            {plan.parameters:,} parameters"
        + (f", {plan.trained_parameters:,} of them trained" if plan.trained_parameters < plan.parameters else ""),
        f"step             {plan.ramp.full} sequences x {plan.sequence_length} = {plan.tokens_per_step:,} tokens; "
        f"{passes} micro-batches of {plan.micro_batch} on each rank",
        f"budget           {plan.total_steps:,} steps, {plan.total_tokens:,} tokens"
        + (f", {plan.total_tokens / train_tokens:.2f} epochs of the corpus" if train_tokens else "")
        + f", {plan.total_tokens / plan.parameters:.1f} tokens per parameter",
        f"compute          {plan.flops_per_token_full / 1e6:,.1f} MFLOP a token (attention in full), "
        f"{plan.flops_per_token_causal / 1e6:,.1f} (causal); "
        f"{plan.flops_per_token_full * plan.total_tokens:.3g} FLOP in all",
        f"memory per rank  {memory.total / gib:.2f} GiB: weights {memory.weights / gib:.2f}, "
        f"gradients {memory.gradients / gib:.2f}, optimizer {memory.optimizer / gib:.2f}, "
        f"activations about {memory.activations / gib:.2f}, logits {memory.logits / gib:.2f}",
    ]
    if plan.ramp.samples:
        lines.insert(3, f"ramp             {plan.ramp.start} -> {plan.ramp.full} sequences over {plan.ramp.samples:,} samples")
    return lines
