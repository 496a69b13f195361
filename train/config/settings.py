"""What every run that trains has, and the rules that reach across its parts."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.errors import ConfigError
from conf.schema import shown
from train.config.adapter import LoraConfig
from train.config.guard import GuardConfig
from train.config.kernels import KernelsConfig
from train.config.model import ModelConfig
from train.config.monitor import MonitorConfig
from train.config.preference import PreferenceConfig
from train.config.training import (
    BatchConfig,
    BudgetConfig,
    CheckpointConfig,
    ComputePrecision,
    EvaluateConfig,
    LaunchConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    ScheduleConfig,
)
from train.config.watchdog import WatchdogConfig


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The engine's settings and those of a run's life. What it reads is the matter of each kind of run."""

    stage: str
    """The verb that made the run, which says what else its settings hold."""
    run: RunConfig = field(default_factory=RunConfig)
    """Name, place and seed of the run."""
    model: ModelConfig
    """Shape of the model."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Sequences of a step."""
    budget: BudgetConfig
    """When the run is finished."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW or Muon, and the rates of groups of parameters."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over the run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the state lies on the ranks."""
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    """How the arithmetic is carried out."""
    precision: Precision = "auto"
    """auto: bf16 where the GPU or the CPU multiplies it, fp32 elsewhere; bf16: weights and activations in bf16, master weights
    and moments in fp32; fp32: all in fp32; fp8: as bf16, with the products of all blocks but the first and the last in 8-bit
    floats, for GPUs from compute capability 8.9 on."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written and which are kept."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """When the held-out split is read."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What is done about losses and gradients that are not as they should be."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    """How long a rank may show no sign of life."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Console, TensorBoard, Weights & Biases."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes and devices."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        raise NotImplementedError

    @property
    def adapter(self) -> LoraConfig | None:
        """Adapters beside the linear layers, which then train alone."""
        return None

    @property
    def frozen(self) -> tuple[str, ...]:
        """Patterns of the names of parameters that stay as they are."""
        return ()

    @property
    def embedding_noise(self) -> float | None:
        """Strength of NEFTune's noise."""
        return None

    @property
    def pairs(self) -> PreferenceConfig | None:
        """How pairs of rows are compared; None: rows are learned as they are."""
        return None

    @property
    def rates(self) -> OptimConfig:
        """The optimizer's settings, with all that follows for the rates of groups of parameters."""
        return self.optim

    @property
    def compute_precision(self) -> ComputePrecision:
        """The precision of a rank, which has settled what auto is."""
        assert self.precision != "auto", "a rank settles it before anything computes"
        return self.precision

    @property
    def yardstick(self) -> str:
        """The figure by which evaluations are compared, and what limits its samples: figures of two of them do not compare."""
        return f"loss with evaluate.max_samples={shown(self.evaluate.max_samples)}"

    def __post_init__(self) -> None:
        problems = []
        if self.sequence_length > self.model.max_positions:
            problems.append(
                f"data.sequence_length={self.sequence_length}: must not exceed "
                f"model.max_positions={self.model.max_positions}; shorten the one or raise the other"
            )
        ramp_limit = self.batch.ramp_samples if self.batch.ramp_start is not None else 0
        if self.budget.tokens is not None and ramp_limit * self.sequence_length > self.budget.tokens:
            problems.append(
                f"batch.ramp_samples={ramp_limit}: the ramp is longer than budget.tokens={self.budget.tokens}; shorten it"
            )
        if self.budget.steps is not None and self.schedule.warmup_steps > self.budget.steps:
            problems.append(
                f"schedule.warmup_steps={self.schedule.warmup_steps}: must not exceed budget.steps={self.budget.steps}"
            )
        if self.schedule.kind == "inverse_sqrt" and not (self.schedule.warmup_steps or self.schedule.warmup_fraction):
            problems.append("schedule.warmup_steps=0: inverse_sqrt starts from the end of a warm-up; give at least 1")
        problems += self._tensor_problems() + self._muon_problems() + self._fp8_problems() + self._own_problems()
        if problems:
            raise ConfigError(problems)

    def _own_problems(self) -> list[str]:
        """What is wrong with the settings of a kind of run, or between them and these."""
        return []

    def _muon_problems(self) -> list[str]:
        """Layouts in which Muon would compute something else than on one rank, or clip something else than gradients."""
        if self.optim.kind != "muon":
            return []
        way_out = "or optim.kind=adamw"
        problems = []
        if self.parallel.tensor > 1:
            problems.append(
                f"parallel.tensor={self.parallel.tensor}: Muon needs whole matrices, a rank would orthogonalize its slices; "
                f"use parallel.tensor=1, {way_out}"
            )
        if self.parallel.zero == 3:
            problems.append(
                f"parallel.zero=3: with optim.kind=muon DeepSpeed takes the gradient norm, and clips, after the matrices were "
                f"made orthogonal; use parallel.zero=1 or 2, {way_out}"
            )
        return problems

    def _fp8_problems(self) -> list[str]:
        """What the products of 8-bit floats cannot do."""
        if self.precision != "fp8":
            return []
        model, problems = self.model, []
        if self.parallel.tensor > 1:
            problems.append(
                f"parallel.tensor={self.parallel.tensor}: precision=fp8 is for whole matrices; use parallel.tensor=1, or "
                f"precision=bf16"
            )
        if model.num_layers < 3:
            problems.append(
                f"model.num_layers={model.num_layers}: precision=fp8 leaves the first and the last block in bf16, so it needs "
                f"at least 3; use precision=bf16"
            )
        sizes = {
            "model.hidden_size": model.hidden_size,
            "model.ffn_size": model.ffn_size,
            "model.head_size x (num_heads + 2 num_kv_heads)": model.head_dim * (model.num_heads + 2 * model.kv_heads),
            "model.head_size x num_heads": model.head_dim * model.num_heads,
            "batch.micro_batch x data.sequence_length": self.batch.micro_batch * self.sequence_length,
        }
        problems += [
            f"{name}={size}: precision=fp8 needs a multiple of 16; change it, or use precision=bf16"
            for name, size in sizes.items()
            if size % 16
        ]
        return problems

    def _tensor_problems(self) -> list[str]:
        """What does not come out even over the tensor-parallel ranks."""
        size, model = self.parallel.tensor, self.model
        problems = []
        for name, amount in (("num_kv_heads", model.kv_heads), ("ffn_size", model.ffn_size)):
            if amount % size:
                problems.append(f"parallel.tensor={size}: must divide model.{name}={amount}; take another tensor")
        if model.vocab_multiple % size:
            problems.append(
                f"parallel.tensor={size}: must divide model.vocab_multiple={model.vocab_multiple}, so that every rank has "
                f"as many rows of the vocabulary; take another tensor"
            )
        tokens = self.batch.micro_batch * self.sequence_length
        # The last batch of a source's held-out text may be of a single sequence.
        evaluated = 0 if self.evaluate.max_samples == 0 else self.sequence_length
        if self.parallel.sequence_parallel and (tokens % size or evaluated % size):
            problems.append(
                f"parallel.sequence_parallel=true: a micro-batch of {tokens if tokens % size else evaluated} tokens does not "
                f"divide by parallel.tensor={size}; change data.sequence_length or the micro-batch"
            )
        return problems
