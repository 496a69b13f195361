"""The whole configuration of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from conf.errors import ConfigError
from conf.schema import shown
from data_pipeline.rows_config import RowsConfig
from data_pipeline.task_config import TaskConfig
from train.config.adapter import LoraConfig
from train.config.method import MethodConfig
from train.config.preference import PreferenceConfig
from train.config.settings import RunSettings
from train.config.training import BudgetConfig, GroupRule, OptimConfig

ROWS_THAT_ARE_WRITTEN = 200
OF_THE_LOSS = ("loss", "perplexity")
"""Figures that need no outputs."""
TRAINABLE = ("classification", "generation", "dialogue", "preference")


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    metric: str | None = None
    """Figure of the held-out rows by which one checkpoint is better than another: loss, accuracy, f1_macro, bleu, rougeL, ...;
    null: accuracy of a classification whose rows are labelled, reward_accuracy of preferences, otherwise the loss."""
    max_rows: int | None = None
    """Held-out rows, the first ones, that the model labels or writes its outputs for at every evaluation; null: all for labels,
    200 for outputs, each of which takes as long as its tokens are many; 0: none."""
    batch_tokens: int | None = None
    """Tokens that a rank runs at a time for that, padding included, and positions whose keys and values are held beside the
    optimizer's state; null: 1,024 on a CPU, 65,536 on a GPU. Give less where an evaluation runs out of memory."""
    shown: int = 3
    """Outputs that are shown on the console; Weights & Biases and the run's folder get all of them."""

    def __post_init__(self) -> None:
        problems = []
        if self.max_rows is not None and self.max_rows < 0:
            problems.append(f"max_rows={self.max_rows}: must not be negative; null takes the usual number, 0 none")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            problems.append(f"batch_tokens={self.batch_tokens}: must be at least 1; null takes the device's usual")
        if self.shown < 0:
            problems.append(f"shown={self.shown}: must not be negative; 0 shows none")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunSettings):
    stage: Literal["finetune"] = "finetune"
    """The verb that made the run."""
    initial_checkpoint: str
    """Folder of a checkpoint, or of a run, whose model, weights and tokenizer the run begins with; also given as
    checkpoint=FOLDER. One from elsewhere is imported first: longhaul import hf=FOLDER."""
    budget: BudgetConfig = field(default_factory=lambda: BudgetConfig(epochs=3.0))
    """When the run is finished."""
    task: TaskConfig
    """What the model learns, and from which rows."""
    data: RowsConfig = field(default_factory=RowsConfig)
    """How rows become sequences."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """What of the model is trained."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """task=preference: how the two answers of a pair are compared."""
    opening: bool | None = None
    """Begin each row as the tokenizer begins a text, which models from elsewhere have learned to expect; null: as the
    checkpoint's own texts began."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """What the held-out rows are measured by on the way."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.data.sequence_length

    @property
    def adapter(self) -> LoraConfig | None:
        """Adapters beside the linear layers, which then train alone."""
        return self.method.lora

    @property
    def frozen(self) -> tuple[str, ...]:
        """Patterns of the names of parameters that stay as they are."""
        return self.method.frozen

    @property
    def embedding_noise(self) -> float | None:
        """Strength of NEFTune's noise."""
        return self.method.neftune_alpha

    @property
    def pairs(self) -> PreferenceConfig | None:
        """How pairs of rows are compared; None: rows are learned as they are."""
        return self.preference if self.task.kind == "preference" else None

    @property
    def rates(self) -> OptimConfig:
        """The optimizer's settings; where rates fall from layer to layer, with a rule for each that no other rule names."""
        decay, layers = self.method.layer_decay, self.model.num_layers
        if decay == 1:
            return self.optim
        rules = [GroupRule(pattern=f"blocks.{number}.*", lr_scale=decay ** (layers - number)) for number in range(layers)]
        rules.append(GroupRule(pattern="embedding.*", lr_scale=decay ** (layers + 1)))
        return replace(self.optim, rules=(*self.optim.rules, *rules))

    @property
    def scored_rows(self) -> int | None:
        """Held-out rows that the model labels or writes its outputs for, the first ones; None: all."""
        usual = None if self.task.kind == "classification" else ROWS_THAT_ARE_WRITTEN
        return usual if self.scoring.max_rows is None else self.scoring.max_rows

    @property
    def metric(self) -> str:
        """Name of the figure of the held-out rows by which one checkpoint is better than another."""
        labels = self.task.kind == "classification" and self.scored_rows != 0
        usual = "accuracy" if labels else "reward_accuracy" if self.pairs is not None else "loss"
        return self.scoring.metric or usual

    @property
    def yardstick(self) -> str:
        """See RunSettings."""
        if self.metric in OF_THE_LOSS or self.pairs is not None:
            return f"{self.metric} with evaluate.max_samples={shown(self.evaluate.max_samples)}"
        return f"{self.metric} with scoring.max_rows={shown(self.scored_rows)}"

    def task_of(self, labels: tuple[str, ...]) -> TaskConfig:
        """The task, with what was found in its rows where the settings left it open."""
        task = self.task
        if task.kind == "classification":
            return replace(task, labels=labels, label_texts=())
        # A model that has learned to end its answers needs no text to stop at.
        return replace(task, stop=())

    def _own_problems(self) -> list[str]:
        problems = []
        if not self.initial_checkpoint:
            problems.append("initial_checkpoint='': needs the folder of a checkpoint or of a run; give checkpoint=runs/first")
        if self.task.kind not in TRAINABLE:
            problems.append(f"task.kind={self.task.kind}: is measured, not learned; choose a task of {', '.join(TRAINABLE)}")
        if self.task.kind != "preference" and self.preference != PreferenceConfig():
            problems.append(f"preference: is of pairs of answers, this is task={self.task.kind}; leave it out")
        if self.evaluate.probes:
            problems.append(f"evaluate.probes={list(self.evaluate.probes)}: are of pretraining; give evaluate.probes=[]")
        if self.method.lora is not None and self.optim.kind == "muon":
            problems.append("optim.kind=muon: is for whole matrices, and with lora none is trained; use optim.kind=adamw")
        if self.method.lora is not None and self.precision == "fp8":
            problems.append("precision=fp8: adapters stand beside weights in bf16 or fp32; use precision=bf16")
        return problems
