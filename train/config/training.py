"""How a run trains: optimizer, schedule, batch, budget, layout, checkpoints, evaluation, launching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conf.errors import ConfigError


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class GroupRule:
    pattern: str
    """Which parameters: a pattern of the whole logical name, such as embedding.* or blocks.*.mlp.*.weight."""
    lr_scale: float = 1.0
    """Their learning rate, as a multiple of the run's."""
    weight_decay: float | None = None
    """Their decay; null: what they would have without the rule."""

    def __post_init__(self) -> None:
        problems = []
        if not self.pattern:
            problems.append("pattern='': needs the name of a parameter, or a pattern such as embedding.*")
        if self.lr_scale < 0:
            problems.append(f"lr_scale={self.lr_scale}: must not be negative; 0 freezes the parameters")
        if self.weight_decay is not None and self.weight_decay < 0:
            problems.append(f"weight_decay={self.weight_decay}: must not be negative")
        _raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    kind: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: momentum made orthogonal for the matrices of the blocks, AdamW for all else; ZeRO 1 or 2."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """muon: peak learning rate of the blocks' matrices; it follows the same schedule."""
    muon_momentum: float = 0.95
    """muon: decay of the running mean of gradients, of the Nesterov kind."""
    newton_schulz: Literal["gram", "standard"] = "gram"
    """muon: how five steps of Newton-Schulz are carried out in bf16 under ZeRO 1: gram on the smaller product in fp16, standard
    in bf16. With precision=fp32 or ZeRO 2 they are the standard ones in fp32."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.95
    """Decay of the running mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and embeddings; norms and biases are not decayed."""
    grad_clip: float | None = 1.0
    """Largest global gradient norm; null: no clipping."""
    rules: tuple[GroupRule, ...] = ()
    """Learning rate and decay of some parameters; the first rule whose pattern fits a parameter counts."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("lr", "muon_lr"):
            if getattr(self, name) <= 0:
                problems.append(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: must be at least 0 and below 1")
        if self.epsilon <= 0:
            problems.append(f"epsilon={self.epsilon}: must be above 0")
        if self.weight_decay < 0:
            problems.append(f"weight_decay={self.weight_decay}: must not be negative")
        if self.grad_clip is not None and self.grad_clip <= 0:
            problems.append(f"grad_clip={self.grad_clip}: must be above 0; null turns clipping off")
        _raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    kind: Literal["cosine", "wsd", "linear", "constant", "inverse_sqrt"] = "cosine"
    """Shape of the learning rate after the warm-up; wsd is warm-up, stable, decay."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""
    warmup_fraction: float | None = None
    """The warm-up as a share of the run's steps, in the place of warmup_steps."""
    min_ratio: float = 0.1
    """Last learning rate as a fraction of the peak, for cosine, wsd and linear."""
    decay_fraction: float = 0.2
    """wsd: fraction of the budget over which the rate falls, linearly, at the end."""

    def __post_init__(self) -> None:
        problems = []
        if self.warmup_steps < 0:
            problems.append(f"warmup_steps={self.warmup_steps}: must not be negative")
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction <= 1:
            problems.append(f"warmup_fraction={self.warmup_fraction}: must lie between 0 and 1")
        if self.warmup_fraction is not None and self.warmup_steps:
            problems.append(
                f"warmup_fraction={self.warmup_fraction}: warmup_steps={self.warmup_steps} is given too; set it to 0"
            )
        if not 0 <= self.min_ratio <= 1:
            problems.append(f"min_ratio={self.min_ratio}: must lie between 0 and 1")
        if not 0 < self.decay_fraction <= 1:
            problems.append(f"decay_fraction={self.decay_fraction}: must be above 0 and at most 1")
        _raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    sequences: int = 256
    """Sequences of one optimizer step, over all ranks."""
    micro_batch: int = 8
    """Sequences that one rank runs at a time; the rest is gradient accumulation."""
    ramp_start: int | None = None
    """Sequences of the first steps, growing to `sequences`; null: no ramp."""
    ramp_increment: int | None = None
    """Sequences by which a ramp grows at a time; null: by ramp_start."""
    ramp_samples: int = 0
    """Samples (sequences) after which the ramp has reached `sequences`."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("sequences", "micro_batch", "ramp_start", "ramp_increment"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}={value}: must be at least 1")
        if not problems and self.sequences % self.micro_batch:
            problems.append(f"micro_batch={self.micro_batch}: must divide batch.sequences={self.sequences}")
        if not problems and self.ramp_start is not None:
            increment = self.ramp_increment or self.ramp_start
            if self.ramp_start > self.sequences:
                problems.append(f"ramp_start={self.ramp_start}: must not exceed batch.sequences={self.sequences}")
            elif (self.sequences - self.ramp_start) % increment:
                problems.append(
                    f"ramp_increment={increment}: must divide the way from ramp_start={self.ramp_start} "
                    f"to batch.sequences={self.sequences}"
                )
            if self.ramp_samples < 1:
                problems.append(f"ramp_samples={self.ramp_samples}: a ramp needs its length in samples")
        if self.ramp_start is None and (self.ramp_increment is not None or self.ramp_samples):
            problems.append("ramp_start=null: ramp_increment and ramp_samples need a ramp_start; or leave them out")
        _raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    tokens: int | None = None
    """Train until this many tokens were read; give this or steps."""
    steps: int | None = None
    """Train for this many optimizer steps; give this or tokens."""
    epochs: float | None = None
    """Fine-tuning: read the rows this many times, rounded up to whole steps; give this or one of the others."""
    stop_at_step: int | None = None
    """Save and stop after this step with exit code 85, to go on later; null: run to the budget."""

    def __post_init__(self) -> None:
        problems = []
        given = [name for name in ("tokens", "steps", "epochs") if getattr(self, name) is not None]
        if not given:
            problems.append("tokens=null: a run needs an end; give budget.tokens=3e9, say, or budget.steps=10000")
        if len(given) > 1:
            first, second, *_ = given
            problems.append(
                f"{first}={getattr(self, first)}: budget.{second}={getattr(self, second)} is given too; set one of them to null"
            )
        if self.epochs is not None and self.epochs <= 0:
            problems.append(f"epochs={self.epochs}: must be above 0")
        for name in ("tokens", "steps", "stop_at_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}={value}: must be at least 1")
        _raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    zero: int = 1
    """What ZeRO shards over the data-parallel ranks: 1 optimizer state, 2 and gradients, 3 and weights."""
    tensor: int = 1
    """Ranks that hold one model together, each its heads, its part of the MLP, its rows of the vocabulary."""
    sequence_parallel: bool = False
    """Also split the hidden states between those layers by rows, which saves activation memory; needs tensor above 1."""
    bucket_elements: int = 50_000_000
    """Elements that ZeRO reduces or gathers in one collective."""

    def __post_init__(self) -> None:
        problems = []
        if self.zero not in (1, 2, 3):
            way_out = "stage 0 is a different trainer without fp32 accumulation and NaN guard; use zero=1"
            problems.append(f"zero={self.zero}: must be 1, 2 or 3; {way_out if self.zero == 0 else 'use zero=1'}")
        if self.tensor < 1:
            problems.append(f"tensor={self.tensor}: must be at least 1")
        if self.sequence_parallel and self.tensor == 1:
            problems.append("sequence_parallel=true: splits rows over tensor-parallel ranks, but tensor=1; raise tensor")
        if self.bucket_elements < 1:
            problems.append(f"bucket_elements={self.bucket_elements}: must be at least 1")
        _raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int | None = 1000
    """Steps between checkpoints; null: only at the end and at a stop."""
    keep_last: int = 2
    """How many of the newest checkpoints are kept."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this step are kept for ever; null: none."""
    keep_best: int = 0
    """How many of those with the lowest held-out loss are kept; only steps that are evaluated too can be among them."""
    asynchronous: bool = True
    """Write beside the training, which waits for a copy in host memory alone; false: wait until it is on disk, and hold no
    memory for it in between."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("every_steps", "keep_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}={value}: must be at least 1")
        if self.keep_last < 1:
            problems.append(f"keep_last={self.keep_last}: must be at least 1, or there is nothing to resume from")
        if self.keep_best < 0:
            problems.append(f"keep_best={self.keep_best}: must not be negative; 0 keeps none for its held-out loss")
        _raise_if(problems)


ProbeName = Literal["copying", "induction", "brackets"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    every_steps: int | None = 500
    """Steps between evaluations on the held-out split; null: only at the end."""
    max_samples: int | None = None
    """Held-out sequences that are read, spread over the sources in proportion, at least one of each; null: all of them; 0: no
    evaluation."""
    micro_batch: int | None = None
    """Sequences that one rank evaluates at a time; null: batch.micro_batch."""
    patience: int | None = None
    """End the run after so many evaluations in a row that found nothing better than the best before; null: never."""
    least_gain: float = 0.0
    """By how much an evaluation must beat the best before to count as better."""
    probes: tuple[ProbeName, ...] = ("copying", "induction", "brackets")
    """Small made-up tasks, measured at every evaluation: repeat random tokens, say what followed a token before, close the
    innermost bracket; empty: none."""

    def __post_init__(self) -> None:
        problems = []
        if self.every_steps is not None and self.every_steps < 1:
            problems.append(f"every_steps={self.every_steps}: must be at least 1; null evaluates at the end only")
        if self.max_samples is not None and self.max_samples < 0:
            problems.append(f"max_samples={self.max_samples}: must not be negative; null reads all, 0 turns evaluation off")
        if self.micro_batch is not None and self.micro_batch < 1:
            problems.append(f"micro_batch={self.micro_batch}: must be at least 1; null takes batch.micro_batch")
        if self.patience is not None and self.patience < 1:
            problems.append(f"patience={self.patience}: must be at least 1; null never ends a run early")
        if self.patience is not None and (self.every_steps is None or self.max_samples == 0):
            problems.append(f"patience={self.patience}: needs evaluations on the way; give evaluate.every_steps")
        if self.least_gain < 0:
            problems.append(f"least_gain={self.least_gain}: must not be negative")
        if len(set(self.probes)) < len(self.probes):
            problems.append(f"probes={list(self.probes)}: names a probe twice; name each once")
        _raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    processes: int | None = None
    """Ranks started on this machine; null: one per visible GPU, one on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What a rank computes on; auto: CUDA when this machine has it."""
    dry_run: bool = False
    """Print the resolved configuration and the plan, and stop."""
    max_restarts: int = 3
    """How often a crashed run is started again without having written a checkpoint in between; 0: never."""
    backoff_seconds: float = 5.0
    """Wait before the first restart; doubled at each further one."""
    time_limit_minutes: float | None = None
    """Time from the command's start until it will be ended from outside; the run saves and stops before, by the time that a
    save has taken so far. null: no limit."""
    collective_timeout_seconds: float = 600.0
    """How long a rank waits for the others in one collective before it gives up."""

    def __post_init__(self) -> None:
        problems = []
        if self.processes is not None and self.processes < 1:
            problems.append(f"processes={self.processes}: must be at least 1")
        if self.max_restarts < 0:
            problems.append(f"max_restarts={self.max_restarts}: must not be negative")
        if self.backoff_seconds < 0:
            problems.append(f"backoff_seconds={self.backoff_seconds}: must not be negative")
        if self.time_limit_minutes is not None and self.time_limit_minutes <= 0:
            problems.append(f"time_limit_minutes={self.time_limit_minutes}: must be above 0; null sets no limit")
        if self.collective_timeout_seconds <= 0:
            problems.append(f"collective_timeout_seconds={self.collective_timeout_seconds}: must be above 0")
        _raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "run"
    """Name of the run: its folder below run.folder, its name in Weights & Biases."""
    folder: str = "runs"
    """Folder that holds the folders of runs."""
    seed: int = 1234
    """Seed of initial weights, sample order and dropout."""
    notes: str = ""
    """Free text that is kept with the run."""

    def __post_init__(self) -> None:
        problems = []
        parts = self.name.split("/")
        if not self.name or any(part in ("", ".", "..") for part in parts) or "\\" in self.name:
            problems.append(f"name={self.name}: must be a relative path without '..', such as first or sweep/003")
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed={self.seed}: must lie between 0 and 2**63 - 1")
        _raise_if(problems)


ComputePrecision = Literal["bf16", "fp32", "fp8"]
"""bf16: weights and activations in bf16, master weights and moments in fp32. fp8: as bf16, with products in fp8."""
Precision = Literal["auto", "bf16", "fp32", "fp8"]
"""What may be asked for; `train.precision` knows what auto is."""
