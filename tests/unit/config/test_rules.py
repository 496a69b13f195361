"""Every rule of the configuration, provoked once from the command line; a rule without a case here fails a test."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from conf.compose import CONF_FOLDER, Composition, compose, validate
from conf.errors import ConfigError
from data_pipeline.config import PrepareConfig
from slurm.config import SubmitConfig
from tests.unit.config.finetune_cases import FINETUNE_CASES
from tests.unit.config.generate_cases import GENERATE_CASES
from tests.unit.config.words import ENOUGH, FINETUNE
from train.config.evaluation import EvaluationConfig
from train.config.export import ExportConfig
from train.config.finetune import FinetuneConfig
from train.config.generate import GenerateConfig
from train.config.hf_import import ImportConfig
from train.config.pretrain import PretrainConfig

REPOSITORY = CONF_FOLDER.parent
RULE_FILES = sorted(
    [*REPOSITORY.glob("train/config/*.py"), REPOSITORY / "data_pipeline/config.py", REPOSITORY / "slurm/config.py"]
)
VERBS = {
    "pretrain": (PretrainConfig, ENOUGH),
    "prepare": (PrepareConfig, []),
    "generate": (GenerateConfig, ["checkpoint=runs/a", "prompt=x"]),
    "export": (ExportConfig, ["checkpoint=runs/a", "out=exported/a"]),
    "import": (ImportConfig, ["hf=models/a", "out=imported/a"]),
    "submit": (SubmitConfig, []),
    "evaluate": (EvaluationConfig, ["checkpoint=runs/a"]),
    "finetune": (FinetuneConfig, FINETUNE),
}
VARIABLE = "cluster.environment=[{{name: {}, value: {}, reason: {}}}]"
LLAMA3 = "model.rope.scaling=llama3"
YARN = "model.rope.scaling=yarn"
LONGROPE = ["model.rope.scaling=longrope", f"model.rope.short_factors={[1] * 16}"]

# verb, words, and how the one problem begins
CASES: list[tuple[str, list[str], str]] = [
    *FINETUNE_CASES,
    ("prepare", ["part=3"], "part=3: must be from 0 to below parts=1"),
    ("prepare", ["parts=3"], "parts=3: phase=all is done in one; only read and encode are split"),
    ("submit", [VARIABLE.format("A-B", "x", "y")], "cluster.environment[0].name='A-B': must be a variable's name"),
    ("submit", [VARIABLE.format("WANDB_API_KEY", "x", "y")], "cluster.environment[0].name=WANDB_API_KEY: looks like a secret"),
    ("submit", [VARIABLE.format("A", "x", "''")], "cluster.environment[0].reason='': say why A is set"),
    ("submit", [VARIABLE.format("A", '"x\ty"', "z")], "cluster.environment[0].value: must be one line"),
    ("submit", ["cluster.container.kind=pyxis"], "cluster.container.image=null: kind=pyxis needs an image"),
    ("submit", ["cluster.container.image=a.sif"], "cluster.container.kind=none: image=a.sif would not be used"),
    ("submit", ["cluster.container.mounts=['/a,/b']"], "cluster.container.mounts='/a,/b': must be one line without commas"),
    ("submit", ['cluster.container.python="a\tb"'], "cluster.container.python: must be one line"),
    ("submit", ["cluster.restarts.most_crashes=-1"], "cluster.restarts.most_crashes=-1: must not be negative"),
    ("submit", ["cluster.restarts.without_progress=0"], "cluster.restarts.without_progress=0: must be at least 1"),
    ("submit", ["cluster.preflight.timeout_seconds=0"], "cluster.preflight.timeout_seconds=0.0: must be above 0"),
    ("submit", ["cluster.preflight.min_free_disk_gb=-1"], "cluster.preflight.min_free_disk_gb=-1.0: must not be negative"),
    ("submit", ["cluster.preflight.max_ecc_errors=-1"], "cluster.preflight.max_ecc_errors=-1: must not be negative; 0"),
    ("submit", ["cluster.preflight.min_matmul_share=1"], "cluster.preflight.min_matmul_share=1.0: must be from 0 to below 1"),
    ("submit", ["cluster.account='a b'"], "cluster.account='a b': must be one word; null leaves it out"),
    ("submit", ["cluster.options=[exclusive]"], "cluster.options='exclusive': must be one option of sbatch on one line"),
    ("submit", ["cluster.modules=['a b']"], "cluster.modules='a b': must be one word"),
    ("submit", ['cluster.setup=["a\tb"]'], "cluster.setup='a\\tb': must be one line"),
    (
        "submit",
        ["cluster.environment=[{name: A, value: x, reason: y}, {name: A, value: z, reason: y}]"],
        "cluster.environment: A is given twice",
    ),
    ("submit", ["cluster.scratch=tmp"], "cluster.scratch='tmp': must be a full path"),
    ("submit", ["cluster.rendezvous_suffix='-ib 0'"], "cluster.rendezvous_suffix='-ib 0': must be part of a host's name"),
    ("submit", ["cluster.restarts.how=chain"], "cluster.restarts.how=chain: a machine without Slurm has no queue"),
    ("submit", ["cluster.time_limit_minutes=0"], "cluster.time_limit_minutes=0: must be at least 1, which is Slurm's grain"),
    ("submit", ["cluster.warning_seconds=0"], "cluster.warning_seconds=0: must be above 0 and below the limit"),
    ("submit", ["cluster.gpus_per_node=-1"], "cluster.gpus_per_node=-1: must not be negative; 0 is a cluster of CPUs"),
    ("submit", ["cluster.cpus_per_task=0"], "cluster.cpus_per_task=0: must be at least 1; null leaves it to the cluster"),
    (
        "submit",
        ["cluster.gpus_per_node=4", "cluster.tasks_per_node=8"],
        "cluster.tasks_per_node=8: a rank needs a GPU of its own, gpus_per_node=4",
    ),
    ("submit", ["cluster.memory_gb_per_node=0"], "cluster.memory_gb_per_node=0.0: must be above 0"),
    ("submit", ["nodes=0"], "nodes=0: must be at least 1"),
    ("submit", ["jobs=0"], "jobs=0: must be from 1 to 1000"),
    ("submit", ["jobs=2"], "jobs=2: only a chain has several"),
    ("submit", ["throttle=0"], "throttle=0: must be at least 1; null sets no limit"),
    ("submit", ["nodes=2"], "nodes=2: cluster.scheduler=local is one machine"),
    ("pretrain", ["run.name=../up"], "run.name=../up: must be a relative path without '..', such as first or sweep/003"),
    ("pretrain", ["run.name=/etc"], "run.name=/etc: must be a relative path"),
    ("pretrain", ["run.name=''"], "run.name=: must be a relative path"),
    ("pretrain", ["run.seed=-1"], "run.seed=-1: must lie between 0 and 2**63 - 1"),
    ("pretrain", ["model.num_layers=0"], "model.num_layers=0: must be at least 1"),
    (
        "pretrain",
        ["model.num_heads=3", "model.num_kv_heads=null"],
        "model.num_heads=3: must divide hidden_size=128; or give head_size",
    ),
    ("pretrain", ["model.head_size=7"], "model.head_size=7: rotary positions need an even head size"),
    ("pretrain", ["model.num_kv_heads=3"], "model.num_kv_heads=3: must divide num_heads=4"),
    ("pretrain", ["model.dropout=1"], "model.dropout=1.0: must be at least 0 and below 1"),
    ("pretrain", ["model.norm_epsilon=0"], "model.norm_epsilon=0.0: must be above 0"),
    ("pretrain", ["model.init_std=-1"], "model.init_std=-1.0: must be above 0"),
    ("pretrain", ["model.window=0"], "model.window=0: must be at least 1"),
    ("pretrain", ["model.window=8", "model.window_pattern=SX"], "model.window_pattern=SX: must be made of S and L, such as"),
    ("pretrain", ["model.window_pattern=SSSL"], "model.window_pattern=SSSL: needs the window that its S layers have"),
    ("pretrain", ["model.local_rope={base: 500.0}"], "model.local_rope: is of layers with a window and rotary positions"),
    ("pretrain", ["model.logit_softcap=0"], "model.logit_softcap=0.0: must be above 0; null is the usual"),
    ("pretrain", ["model.embedding_scale=0"], "model.embedding_scale=0.0: must be above 0"),
    (
        "pretrain",
        ["model.residual=parallel", "model.norm_placement=post"],
        "model.norm_placement=post: residual=parallel has norms before its sublayers only; take norm_placement=pre or",
    ),
    ("pretrain", ["model.rope.fraction=2"], "model.rope.fraction=2.0: must be above 0 and at most 1"),
    ("pretrain", ["model.rope.fraction=0.1"], "model.rope.fraction=0.1: rotates 3 of head_size=32, which must be an even"),
    (
        "pretrain",
        ["model.window=8", "model.local_rope={fraction: 0.01}"],
        "model.local_rope.fraction=0.01: rotates 0 of head_size=32",
    ),
    ("pretrain", ["model.window=8"], "model.window=8: family=llama has null; take that, or family=custom, which trains"),
    ("pretrain", ["model.rope.scaling=linear", "model.rope.factor=0"], "model.rope.factor=0.0: must be at least 1"),
    ("pretrain", ["model.attention_scale=0"], "model.attention_scale=0.0: must be above 0; null is the usual"),
    ("pretrain", ["model.attention_softcap=-1"], "model.attention_softcap=-1.0: must be above 0; null is the usual"),
    ("pretrain", ["model.z_loss=-1"], "model.z_loss=-1.0: must not be negative; 0 turns it off"),
    ("pretrain", ["model.rope.base=1"], "model.rope.base=1.0: must be above 1; Llama 2 has 10000, Llama 3 has 500000"),
    (
        "pretrain",
        [LLAMA3, "model.rope.low_frequency_factor=9"],
        "model.rope.low_frequency_factor=9.0: must be above 0 and below",
    ),
    ("pretrain", [LLAMA3, "model.rope.factor=0.5"], "model.rope.factor=0.5: must be at least 1"),
    (
        "pretrain",
        [YARN, "model.rope.original_max_positions=1"],
        "model.rope.original_max_positions=1: must be at least 2",
    ),
    ("pretrain", [YARN, "model.rope.slow_turns=32"], "model.rope.slow_turns=32.0: must be above 0 and below fast_turns=32.0"),
    ("pretrain", [YARN, "model.rope.attention_factor=0"], "model.rope.attention_factor=0.0: must be above 0; null takes"),
    ("pretrain", ["model.rope.long_factors=[1,0]"], "model.rope.long_factors: holds 0.0; each must be above 0"),
    (
        "pretrain",
        [*LONGROPE, "model.rope.long_factors=[2]"],
        "model.rope.long_factors: holds 1 numbers; scaling=longrope",
    ),
    ("pretrain", ["model.qk_norm_across_heads=true"], "model.qk_norm_across_heads=true: says how qk_norm is taken; give"),
    ("pretrain", ["optim.lr=0"], "optim.lr=0.0: must be above 0"),
    ("pretrain", ["optim.muon_lr=0"], "optim.muon_lr=0.0: must be above 0"),
    ("pretrain", ["optim.muon_momentum=1"], "optim.muon_momentum=1.0: must be at least 0 and below 1"),
    (
        "pretrain",
        ["optim=muon", "parallel.tensor=2"],
        "parallel.tensor=2: Muon needs whole matrices, a rank would orthogonalize its slices; use parallel.tensor=1, or",
    ),
    (
        "pretrain",
        ["optim=muon", "parallel=zero3"],
        "parallel.zero=3: with optim.kind=muon DeepSpeed takes the gradient norm, and clips, after",
    ),
    (
        "pretrain",
        ["precision=fp8", "parallel.tensor=2"],
        "parallel.tensor=2: precision=fp8 is for whole matrices; use parallel.tensor=1, or precision=bf16",
    ),
    ("pretrain", ["precision=fp8", "model.num_layers=2"], "model.num_layers=2: precision=fp8 leaves the first and the last"),
    ("pretrain", ["precision=fp8", "model.ffn_size=40"], "model.ffn_size=40: precision=fp8 needs a multiple of 16; change it"),
    ("pretrain", ["optim.beta2=1"], "optim.beta2=1.0: must be at least 0 and below 1"),
    ("pretrain", ["optim.epsilon=0"], "optim.epsilon=0.0: must be above 0"),
    ("pretrain", ["optim.weight_decay=-0.1"], "optim.weight_decay=-0.1: must not be negative"),
    ("pretrain", ["optim.rules=[{pattern: ''}]"], "optim.rules[0].pattern='': needs the name of a parameter"),
    ("pretrain", ["optim.rules=[{pattern: a, lr_scale: -1}]"], "optim.rules[0].lr_scale=-1.0: must not be negative; 0 freezes"),
    ("pretrain", ["optim.rules=[{pattern: a, weight_decay: -1}]"], "optim.rules[0].weight_decay=-1.0: must not be negative"),
    ("pretrain", ["model.mup_base_width=0"], "model.mup_base_width=0: must be at least 1; null turns the scaling off"),
    ("pretrain", ["optim.grad_clip=0"], "optim.grad_clip=0.0: must be above 0; null turns clipping off"),
    ("pretrain", ["schedule.warmup_steps=-1"], "schedule.warmup_steps=-1: must not be negative"),
    ("pretrain", ["schedule.min_ratio=1.1"], "schedule.min_ratio=1.1: must lie between 0 and 1"),
    ("pretrain", ["schedule.decay_fraction=0"], "schedule.decay_fraction=0.0: must be above 0 and at most 1"),
    ("pretrain", ["schedule.warmup_steps=5001"], "schedule.warmup_steps=5001: must not exceed budget.steps=5000"),
    ("pretrain", ["schedule=inverse_sqrt", "schedule.warmup_steps=0"], "schedule.warmup_steps=0: inverse_sqrt starts from"),
    ("pretrain", ["batch.sequences=-8"], "batch.sequences=-8: must be at least 1"),
    ("pretrain", ["batch.micro_batch=7"], "batch.micro_batch=7: must divide batch.sequences=256"),
    (
        "pretrain",
        ["batch.ramp_start=512", "batch.ramp_samples=9"],
        "batch.ramp_start=512: must not exceed batch.sequences=256",
    ),
    (
        "pretrain",
        ["batch.ramp_start=64", "batch.ramp_increment=100", "batch.ramp_samples=9"],
        "batch.ramp_increment=100: must divide the way from ramp_start=64 to batch.sequences=256",
    ),
    ("pretrain", ["batch.ramp_start=64"], "batch.ramp_samples=0: a ramp needs its length in samples"),
    ("pretrain", ["batch.ramp_samples=64"], "batch.ramp_start=null: ramp_increment and ramp_samples need a ramp_start"),
    (
        "pretrain",
        ["budget.steps=null", "budget.tokens=6400", "batch.ramp_start=64", "batch.ramp_samples=101"],
        "batch.ramp_samples=101: the ramp is longer than budget.tokens=6400; shorten it",
    ),
    ("pretrain", ["budget.steps=null"], "budget.tokens=null: a run needs an end; give budget.tokens=3e9, say, or budget.steps"),
    ("pretrain", ["budget.tokens=9e9"], "budget.tokens=9000000000: budget.steps=5000 is given too; set one of them to null"),
    ("pretrain", ["budget.stop_at_step=0"], "budget.stop_at_step=0: must be at least 1"),
    ("pretrain", ["parallel.zero=0"], "parallel.zero=0: must be 1, 2 or 3; stage 0 is a different trainer"),
    ("pretrain", ["parallel.zero=4"], "parallel.zero=4: must be 1, 2 or 3; use zero=1"),
    ("pretrain", ["parallel.tensor=0"], "parallel.tensor=0: must be at least 1"),
    (
        "pretrain",
        ["parallel.sequence_parallel=true"],
        "parallel.sequence_parallel=true: splits rows over tensor-parallel ranks",
    ),
    ("pretrain", ["parallel.tensor=4"], "parallel.tensor=4: must divide model.num_kv_heads=2; take another tensor"),
    (
        "pretrain",
        ["parallel.tensor=2", "model.vocab_multiple=1"],
        "parallel.tensor=2: must divide model.vocab_multiple=1, so that every rank has as many rows",
    ),
    (
        "pretrain",
        ["parallel.tensor=2", "parallel.sequence_parallel=true", "data.sequence_length=63", "batch.micro_batch=1"],
        "parallel.sequence_parallel=true: a micro-batch of 63 tokens does not divide by parallel.tensor=2",
    ),
    (
        "pretrain",
        ["parallel.tensor=2", "parallel.sequence_parallel=true", "data.sequence_length=63", "batch.micro_batch=2"],
        "parallel.sequence_parallel=true: a micro-batch of 63 tokens does not divide by parallel.tensor=2",
    ),
    ("pretrain", ["kernels.logits_bytes=0"], "kernels.logits_bytes=0: must be at least 1; 1073741824 (1 GiB) is usual"),
    ("pretrain", ["kernels.collect_garbage_steps=0"], "kernels.collect_garbage_steps=0: must be at least 1; null leaves"),
    ("pretrain", ["parallel.bucket_elements=0"], "parallel.bucket_elements=0: must be at least 1"),
    ("pretrain", ["checkpoint.every_steps=0"], "checkpoint.every_steps=0: must be at least 1"),
    (
        "pretrain",
        ["checkpoint.keep_best=-1"],
        "checkpoint.keep_best=-1: must not be negative; 0 keeps none for its held-out loss",
    ),
    ("pretrain", ["guard.spike_threshold=0"], "guard.spike_threshold=0.0: must be above 0"),
    ("pretrain", ["guard.spike_window_steps=0"], "guard.spike_window_steps=0: must be at least 1"),
    ("pretrain", ["guard.spike_min_steps=0"], "guard.spike_min_steps=0: must be at least 1"),
    ("pretrain", ["guard.diverged_after_skips=0"], "guard.diverged_after_skips=0: must be at least 1"),
    ("pretrain", ["guard.max_rollbacks=-1"], "guard.max_rollbacks=-1: must not be negative"),
    ("pretrain", ["guard.spike_min_steps=129"], "guard.spike_min_steps=129: must not exceed guard.spike_window_steps=128"),
    ("pretrain", ["watchdog.step_seconds=0"], "watchdog.step_seconds=0.0: must be above 0; null waits for ever"),
    ("pretrain", ["watchdog.grace_seconds=0"], "watchdog.grace_seconds=0.0: must be above 0"),
    ("pretrain", ["monitor.norms_every_steps=0"], "monitor.norms_every_steps=0: must be at least 1"),
    ("pretrain", ["launch.time_limit_minutes=0"], "launch.time_limit_minutes=0.0: must be above 0; null sets no limit"),
    ("pretrain", ["checkpoint.keep_last=0"], "checkpoint.keep_last=0: must be at least 1, or there is nothing to resume from"),
    ("pretrain", ["evaluate.every_steps=0"], "evaluate.every_steps=0: must be at least 1; null evaluates at the end only"),
    ("pretrain", ["evaluate.max_samples=-1"], "evaluate.max_samples=-1: must not be negative; null reads all, 0 turns"),
    ("pretrain", ["evaluate.micro_batch=0"], "evaluate.micro_batch=0: must be at least 1; null takes batch.micro_batch"),
    ("pretrain", ["evaluate.probes=[copying,copying]"], "evaluate.probes=['copying', 'copying']: names a probe twice"),
    ("pretrain", ["evaluate.probes=[copy]"], "evaluate.probes[0]=copy: must be copying, induction or brackets"),
    ("pretrain", ["launch.processes=0"], "launch.processes=0: must be at least 1"),
    ("pretrain", ["launch.max_restarts=-1"], "launch.max_restarts=-1: must not be negative"),
    ("pretrain", ["launch.backoff_seconds=-1"], "launch.backoff_seconds=-1.0: must not be negative"),
    ("pretrain", ["launch.collective_timeout_seconds=0"], "launch.collective_timeout_seconds=0.0: must be above 0"),
    ("pretrain", ["monitor.console_every_steps=0"], "monitor.console_every_steps=0: must be at least 1"),
    ("pretrain", ["monitor.wandb.init_timeout_seconds=0"], "monitor.wandb.init_timeout_seconds=0.0: must be above 0"),
    ("pretrain", ["monitor.wandb.project=''"], "monitor.wandb.project='': needs a name; or mode=disabled"),
    ("pretrain", ["monitor.wandb.tags=['']"], "monitor.wandb.tags='': a tag has 1 to 64 characters"),
    ("pretrain", ["data.sequence_length=513"], "data.sequence_length=513: must not exceed model.max_positions=512; shorten"),
    ("pretrain", ["data.sequence_length=0"], "data.sequence_length=0: must be at least 1 token"),
    ("pretrain", ["data.max_epochs=0"], "data.max_epochs=0.0: must be positive; null means no limit"),
    ("pretrain", ["data.sources=[]"], "data.sources=[]: needs at least one prepared corpus"),
    ("pretrain", ["data.sources=[{path: ''}]"], "data.sources[0].path='': needs the folder of a prepared corpus"),
    ("pretrain", ["data.sources=[{path: a, weight: 0}]"], "data.sources[0].weight=0.0: must be a positive number"),
    ("pretrain", ["data.sources=[{path: a, name: ''}]"], "data.sources[0].name='': must not be empty"),
    ("pretrain", ["data.sources=[{path: x/a},{path: y/a}]"], "data.sources: the name a occurs more than once"),
    ("pretrain", ["data.sources=[{path: a},{path: b, weight: 1e-6}]"], "data.sources: weight=1e-06 of b is 1.00e-06 of all"),
    ("prepare", ["corpus.name=a/b"], "corpus.name='a/b': must be usable as a folder name"),
    ("prepare", ["corpus.paths=[]"], "corpus.paths=[]: needs at least one file, folder or pattern"),
    ("prepare", ["corpus.paths=['']"], "corpus.paths: holds an empty path; remove it"),
    ("prepare", ["corpus.suffixes=[py]"], "corpus.suffixes=['py']: each must begin with a dot, such as .py"),
    ("prepare", ["corpus.text_field=''"], "corpus.text_field='': needs the name of the field"),
    ("prepare", ["corpus.document_separator='--'"], "corpus.document_separator: only for reader=text"),
    ("prepare", ["corpus=text", "corpus.paths=[a]", "corpus.document_separator=''"], "corpus.document_separator='': must not"),
    ("prepare", ["corpus=hf", "corpus.paths=['stdlib:']"], "corpus.paths=[stdlib:]: not a Hugging Face data set"),
    ("prepare", ["corpus.encoding=utf-9"], "corpus.encoding='utf-9': Python knows no such text encoding; try utf-8"),
    ("prepare", ["tokenizer=hf"], "tokenizer.path='': needs the folder of a Hugging Face tokenizer"),
    ("prepare", ["tokenizer.end_of_document=''"], "tokenizer.end_of_document='': must not be empty"),
    ("prepare", ["tokenizer.path=t", "tokenizer.extra_special_tokens=['<a>']"], "tokenizer.extra_special_tokens=['<a>']: only"),
    ("prepare", ["tokenizer.vocab_size=256"], "tokenizer.vocab_size=256: needs at least 257"),
    ("prepare", ["tokenizer.extra_special_tokens=['<a>','<a>']"], "tokenizer.extra_special_tokens=['<a>', '<a>']: must be"),
    ("prepare", ["tokenizer.min_frequency=0"], "tokenizer.min_frequency=0: must be at least 1"),
    ("prepare", ["tokenizer.training_bytes=0"], "tokenizer.training_bytes=0: must be at least 1; null means the whole corpus"),
    ("prepare", ["held_out_fraction=1"], "held_out_fraction=1.0: must be at least 0 and below 1; 0.01 is usual"),
    ("prepare", ["shard_tokens=1000"], "shard_tokens=1000: must be at least 1024"),
    ("prepare", ["min_document_bytes=0"], "min_document_bytes=0: must be at least 1"),
    ("prepare", ["workers=0"], "workers=0: must be at least 1; null means all cores"),
    ("prepare", ["output=' '"], "output='': needs a folder; set it to null for data/<corpus.name>"),
    *GENERATE_CASES,
    ("export", ["checkpoint=''"], "checkpoint='': needs the folder of a checkpoint or of a run"),
    ("export", ["out=.."], "out='..': needs the name of a folder to make, such as out=exported/first"),
    ("export", ["shard_bytes=1"], "shard_bytes=1: must be at least 1024; 5000000000 is usual"),
    ("import", ["hf=''"], "hf='': needs the folder of a Hugging Face model, or its name on the hub"),
    ("import", ["out=.."], "out='..': needs the name of a folder to make, such as out=imported/first"),
    ("import", ["shard_bytes=1"], "shard_bytes=1: must be at least 1024; 5000000000 is usual"),
    ("export", ["proof_sequences=0"], "proof_sequences=0: must be at least 1; null means all of them"),
    ("evaluate", ["hf=models/a"], "checkpoint: give exactly one of checkpoint and hf, such as checkpoint=runs/first"),
    ("evaluate", ["checkpoint=''"], "checkpoint='': needs the folder of a model"),
    ("evaluate", ["checkpoint=null", "hf=''"], "hf='': needs the folder of a model"),
    ("evaluate", ["limit=0"], "limit=0: must be at least 1"),
    ("evaluate", ["processes=0"], "processes=0: must be at least 1"),
    ("evaluate", ["tensor=2"], "tensor=2: must divide processes=1; give processes=2"),
    ("evaluate", ["tensor=3", "processes=4"], "tensor=3: must divide processes=4; give processes=3"),
    ("evaluate", ["resamples=-1"], "resamples=-1: must not be negative; 0 makes no intervals"),
    ("evaluate", ["seed=-1"], "seed=-1: must not be negative"),
    ("evaluate", ["confidence=1"], "confidence=1.0: must lie between 0 and 1, such as 0.95"),
    ("evaluate", ["task.stride=0"], "task.stride=0: the window must move by at least 1 token"),
]


@dataclass(frozen=True, kw_only=True)
class Provoked:
    """What all cases together said, and the lines of the rule files that ran meanwhile."""

    problems: tuple[tuple[str, ...], ...]
    lines: frozenset[tuple[str, int]]


@cache
def base(verb: str, given: tuple[str, ...]) -> Composition:
    return compose(verb, given)


def composition(verb: str, given: tuple[str, ...], words: Sequence[str]) -> Composition:
    """What `compose` makes of the words; where they only set fields, they are put into what it has made of `given`, since it
    takes 0.15 s a time."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    parsed = [OverridesParser.create().parse_override(word) for word in words]
    if not all("." in word.key_or_group and not word.is_add() and not word.is_delete() for word in parsed):
        return compose(verb, [*given, *words])
    tree = OmegaConf.create(base(verb, given).tree)
    for word in parsed:
        OmegaConf.update(tree, word.key_or_group, word.value())
    return Composition(tree=OmegaConf.to_container(tree))


def test_what_is_put_in_is_what_would_be_composed() -> None:
    seen = set()
    for verb, words, _ in CASES:
        plain = all("." in word.partition("=")[0] for word in words)
        if plain and verb not in seen:
            given = tuple(VERBS[verb][1])
            assert composition(verb, given, words) == compose(verb, [*given, *words]), verb
            seen.add(verb)
    assert len(seen) >= 4


@pytest.fixture(scope="module")
def provoked() -> Provoked:
    """All cases, run once with an eye on the lines of the rule files."""
    watched = {str(path) for path in RULE_FILES}
    lines: set[tuple[str, int]] = set()

    def line(frame: FrameType, event: str, argument: Any) -> Callable | None:
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Callable | None:
        return line if frame.f_code.co_filename in watched else None

    found = []
    for verb, words, _ in CASES:
        schema, given = VERBS[verb]
        composed = composition(verb, tuple(given), words)
        before = sys.gettrace()
        sys.settrace(call)
        try:
            validate(schema, composed)
            found.append(())
        except ConfigError as error:
            found.append(error.problems)
        finally:
            sys.settrace(before)
    return Provoked(problems=tuple(found), lines=frozenset(lines))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{verb} {' '.join(words)}" for verb, words, _ in CASES])
def test_rule(number: int, provoked: Provoked) -> None:
    problems = provoked.problems[number]
    assert len(problems) == 1, problems
    assert problems[0].startswith(CASES[number][2])


@pytest.mark.parametrize("path", RULE_FILES, ids=[path.relative_to(REPOSITORY).as_posix() for path in RULE_FILES])
def test_every_rule_has_a_case(path: Path, provoked: Provoked) -> None:
    silent = [line for line in rule_lines(path) if (str(path), line) not in provoked.lines]
    assert not silent, f"{path.name}: no case provokes the rules in lines {silent}"


def rule_lines(path: Path) -> list[int]:
    """Lines where a configuration's own check adds a problem."""
    checks = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.name == "__post_init__" or node.name.endswith("_problems"))
    ]
    return sorted({node.lineno for check in checks for node in ast.walk(check) if _adds_problem(node)})


def _adds_problem(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise):  # `raise ConfigError(problems)` only passes on what was collected
        arguments = node.exc.args if isinstance(node.exc, ast.Call) else []
        return any(isinstance(argument, ast.List) for argument in arguments)
    is_append = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append"
    return is_append and isinstance(node.func.value, ast.Name) and node.func.value.id == "problems"


@pytest.mark.parametrize("verb", VERBS)
def test_what_the_cases_start_from_is_valid(verb: str) -> None:
    schema, given = VERBS[verb]
    validate(schema, compose(verb, given))
