"""`longhaul VERB [GROUP=OPTION] [FIELD=VALUE] ...`: finds the verb, hands it its words, turns errors into one clear text."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from conf.errors import UserError
from tools.multirun import run_all

EXIT_USER_ERROR = 93  # the exit code of a run that must not be started again as it is


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One word of the command: what it does, and where its function, root file and schema are."""

    summary: str
    function: str
    root: str
    schema: str
    examples: tuple[str, ...] = ()
    sweep: str | None = None
    """Function that takes all combinations of -m at once, where it is not one process for each."""


VERBS: dict[str, Verb] = {
    "prepare": Verb(
        summary="read a corpus, remove duplicates, train or take a tokenizer, write token shards",
        function="tools.verbs:prepare",
        root="prepare",
        schema="data_pipeline.config:PrepareConfig",
        examples=("longhaul prepare corpus=stdlib", "longhaul prepare corpus=jsonl 'corpus.paths=[dump/*.jsonl.zst]'"),
    ),
    "pretrain": Verb(
        summary="train a model on prepared corpora; started again, it goes on from its newest checkpoint",
        function="train.launch:pretrain",
        root="pretrain",
        schema="train.config.pretrain:PretrainConfig",
        examples=(
            "longhaul pretrain experiment=quickstart",
            "longhaul pretrain model=llama_160m 'data.sources=[{path: data/mine}]' budget.tokens=3000000000 run.name=first",
            "longhaul pretrain experiment=quickstart optim.lr=1e-3,3e-3 -m",
            "longhaul pretrain initial_checkpoint=imported/qwen3 'data.sources=[{path: data/mine}]' budget.tokens=1e9",
        ),
    ),
    "finetune": Verb(
        summary="teach a trained model a task from labelled rows; started again, it goes on from its newest checkpoint",
        function="train.launch:finetune",
        root="finetune",
        schema="train.config.finetune:FinetuneConfig",
        examples=(
            "longhaul finetune checkpoint=runs/first task=classification 'task.data=[{path: sst2/train.tsv}]' run.name=sst2",
            "longhaul finetune checkpoint=runs/first task=translation 'task.data=[{path: train.de, targets: train.en}]'",
            "longhaul finetune checkpoint=imported/qwen3 task=dialogue method=lora 'task.data=[{path: chats.jsonl}]'",
            "longhaul finetune checkpoint=runs/chat task=preference method=lora 'task.data=[{path: pairs.jsonl}]'",
            "longhaul finetune checkpoint=runs/first task=translation 'task.data=[{path: train.tsv}]' launch.dry_run=true",
        ),
    ),
    "plan": Verb(
        summary="show what `pretrain` would do with the same words: configuration, steps, memory, FLOPs",
        function="train.launch:plan_only",
        root="pretrain",
        schema="train.config.pretrain:PretrainConfig",
        examples=("longhaul plan model=llama_8b budget.tokens=15e12 batch.sequences=512 launch.processes=64 parallel=zero3",),
    ),
    "submit": Verb(
        summary="run `pretrain`, `finetune`, `prepare`, `import`, `export`, `evaluate` as Slurm jobs until done, or here",
        function="slurm.submit:submit",
        root="submit",
        schema="slurm.config:SubmitConfig",
        examples=(
            "longhaul submit pretrain experiment=quickstart cluster=slurm_gpu cluster.account=abc nodes=4 dry_run=true",
            "longhaul submit prepare corpus=jsonl 'corpus.paths=[dump/*.jsonl.zst]' parts=16 cluster=slurm_cpu",
            "longhaul submit finetune checkpoint=runs/first 'task.data=[{path: rows.jsonl}]' cluster=slurm_gpu nodes=2",
            "longhaul submit export checkpoint=runs/first after=[first] cluster=slurm_cpu",
            "longhaul submit evaluate checkpoint=runs/first after=[first] processes=8 cluster=slurm_gpu",
            "longhaul submit pretrain experiment=quickstart optim.lr=1e-3,3e-3 -m throttle=2 cluster=slurm_gpu",
        ),
        sweep="slurm.submit:sweep",
    ),
    "status": Verb(
        summary="show the runs: state, step, loss, speed, time left, attempts, nodes, reason of the last stop",
        function="slurm.verbs:status",
        root="status",
        schema="slurm.verbs:StatusConfig",
        examples=("longhaul status", "longhaul status run=first"),
    ),
    "logs": Verb(
        summary="show and follow the log of a rank, through all attempts",
        function="slurm.verbs:logs",
        root="logs",
        schema="slurm.verbs:LogsConfig",
        examples=("longhaul logs run=first rank=3",),
    ),
    "cancel": Verb(
        summary="end a submitted run; it saves first",
        function="slurm.verbs:cancel",
        root="cancel",
        schema="slurm.verbs:CancelConfig",
        examples=("longhaul cancel run=first",),
    ),
    "resume": Verb(
        summary="submit a run that was stopped or cancelled again, as it was",
        function="slurm.verbs:resume",
        root="resume",
        schema="slurm.verbs:ResumeConfig",
        examples=("longhaul resume run=first",),
    ),
    "generate": Verb(
        summary="continue a prompt with a trained model, or chat with one that has learned dialogues",
        function="tools.verbs:generate",
        root="generate",
        schema="train.config.generate:GenerateConfig",
        examples=('longhaul generate checkpoint=runs/first prompt="def main("', "longhaul generate checkpoint=runs/chat"),
    ),
    "evaluate": Verb(
        summary="measure a model: likelihood of texts, labels, outputs, lm-eval tasks; with confidence intervals",
        function="tools.verbs:evaluate",
        root="evaluate",
        schema="train.config.evaluation:EvaluationConfig",
        examples=(
            "longhaul evaluate checkpoint=runs/first",
            "longhaul evaluate checkpoint=runs/sst2 'task.data=[{path: sst2/test.tsv}]'",
            "longhaul evaluate hf=exported/first 'task.data=[{path: books/*.txt, name: books}]' task.stride=64",
            "longhaul evaluate checkpoint=runs/first task=answers 'task.data=[{path: squad/dev.jsonl}]' limit=500",
            "longhaul evaluate checkpoint=runs/first task=harness 'task.tasks=[mine]' task.include=tasks",
        ),
    ),
    "import": Verb(
        summary="read a Hugging Face model as a checkpoint, with the proof that both compute the same",
        function="tools.verbs:import_",
        root="import",
        schema="train.config.hf_import:ImportConfig",
        examples=("longhaul import hf=models/Qwen3-0.6B out=imported/qwen3", "longhaul import hf=HuggingFaceTB/SmolLM2-135M"),
    ),
    "export": Verb(
        summary="write a checkpoint as a Hugging Face model folder, with a proof that both are the same; or its adapters",
        function="tools.verbs:export",
        root="export",
        schema="train.config.export:ExportConfig",
        examples=(
            "longhaul export checkpoint=runs/first out=exported/first",
            "longhaul export checkpoint=runs/chat adapter=true out=exported/chat-adapter",
        ),
    ),
    "baseline": Verb(
        summary="compare a run's held-out loss with a bigram model fitted on the tokens that the run read",
        function="tools.verbs:baseline",
        root="baseline",
        schema="tools.baseline:BaselineConfig",
        examples=("longhaul baseline run=runs/first",),
    ),
    "stdlib-tasks": Verb(
        summary="make two labelled tasks of Python's standard library: whose docstring is it, what does this do",
        function="tools.verbs:stdlib_tasks",
        root="stdlib_tasks",
        schema="tools.stdlib_tasks:StdlibTasksConfig",
        examples=("longhaul stdlib-tasks out=data/stdlib_tasks held_out_of=data/stdlib",),
    ),
    "task-baseline": Verb(
        summary="what simple means reach on a task's rows: the commonest label, logistic regression, ...",
        function="tools.verbs:task_baseline",
        root="task_baseline",
        schema="tools.task_baseline:TaskBaselineConfig",
        examples=(
            "longhaul task-baseline 'task.data=[{path: sst2/train.tsv}]' 'task.validation=[{path: sst2/dev.tsv}]'",
            "longhaul task-baseline task=summarisation 'task.data=[{path: a.jsonl}]' 'task.validation=[{path: b.jsonl}]'",
        ),
    ),
    "inspect": Verb(
        summary="show which documents a step read, and whether the data still is what it read",
        function="tools.verbs:inspect",
        root="inspect",
        schema="tools.inspect_step:InspectConfig",
        examples=("longhaul inspect run=runs/first step=41203", "longhaul inspect run=runs/first step=41203 sample=329617"),
    ),
    "report": Verb(
        summary="write a run as one page: curves, attempts, where its time went; or send it to W&B",
        function="tools.verbs:report",
        root="report",
        schema="tools.report:ReportConfig",
        examples=("longhaul report run=runs/first", "longhaul report run=runs/first wandb=true"),
    ),
    "compare": Verb(
        summary="hold runs or checkpoints against the first one: scores with p-values, curves, settings, cost",
        function="tools.compare.verb:compare",
        root="compare",
        schema="tools.compare.verb:CompareConfig",
        examples=(
            "longhaul compare run=runs/first run=runs/second",
            "longhaul compare checkpoint=runs/first/checkpoints/step-00001000 checkpoint=runs/first run=runs/second",
        ),
    ),
    "verify-resume": Verb(
        summary="run some steps of a configuration twice, and once with a kill between, and compare to the bit",
        function="tools.verify_resume:verify_resume",
        root="verify_resume",
        schema="tools.verify_resume:VerifyConfig",
        examples=("longhaul verify-resume steps=20 model=llama_1b 'data.sources=[{path: data/mine}]' launch.processes=8",),
    ),
    "chaos": Verb(
        summary="do one fault after another to a small run, and show that it ends as the undisturbed one",
        function="tools.chaos:chaos",
        root="chaos",
        schema="tools.chaos:ChaosConfig",
        examples=("longhaul chaos 'data.sources=[{path: data/stdlib}]' faults=20 parallel=zero3",),
    ),
    "bench": Verb(
        summary="measure: `bench step` the loop, `bench attention | loader | checkpoint | startup | likelihood` its parts",
        function="tools.verbs:bench",
        root="bench",
        schema="tools.bench_startup:BenchConfig",
        examples=(
            "longhaul bench startup",
            "longhaul bench step peer=hf trace=true",
            "longhaul bench attention sequence_length=1024 kv_heads=2 documents=4",
            "longhaul bench loader sequence_length=1024",
            "longhaul bench checkpoint model=llama_160m",
        ),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = " ".join(["longhaul", *words[:1]])
    try:
        code = _run(words)
        sys.stdout.flush()  # here, where a closed pipe is understood
        return code
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # `longhaul ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is not written a second time at the exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        from tools.help import overview

        print(overview(VERBS))
        return 0
    if words[0] == "--version":
        print(f"longhaul {_version()}")
        return 0
    name = words[0]
    if name not in VERBS:
        from conf.schema import nearest

        raise UserError(f"no such verb.{nearest(name, list(VERBS))} `longhaul --help` lists the verbs")
    verb = VERBS[name]
    overrides, config_dir, options = _split(words[1:])
    if "help" in options:
        from tools.help import verb_help

        if name == "bench" and overrides:
            from tools.verbs import bench_of

            module, schema, root = bench_of(overrides[0])
            name, verb = f"{name} {overrides[0]}", replace(verb, root=root, schema=f"{module}:{schema}")
        print(verb_help(name, verb, config_dir))
        return 0
    if "multirun" in options and verb.sweep is not None:
        return int(load(verb.sweep)(overrides, config_dir))
    if "multirun" in options:
        return run_all(name, overrides, config_dir)
    return int(load(verb.function)(overrides, config_dir))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("longhaul")
    except PackageNotFoundError:
        return "(a source tree that is not installed: pip install -e .)"


def load(path: str) -> object:
    """The object that 'module:name' means."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _split(words: list[str]) -> tuple[list[str], str | None, set[str]]:
    """(overrides, --config-dir, other options) of the words after the verb."""
    overrides: list[str] = []
    options: set[str] = set()
    config_dir = None
    rest = iter(words)
    for word in rest:
        if word in ("-h", "--help"):
            options.add("help")
        elif word in ("-m", "--multirun"):
            options.add("multirun")
        elif word == "--config-dir":
            config_dir = next(rest, None)
            if config_dir is None:
                raise UserError("--config-dir: needs a folder")
        elif word.startswith("--config-dir="):
            config_dir = word.partition("=")[2]
        elif word.startswith("-"):
            raise UserError(f"{word}: no such option; settings are given as name=value, see --help")
        else:
            overrides.append(word)
    return overrides, config_dir, options


if __name__ == "__main__":
    sys.exit(main())
