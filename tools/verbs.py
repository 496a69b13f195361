"""One function per verb that needs no launcher: compose, validate, run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from conf.compose import compose, validate
from conf.errors import UserError


def literal(word: str) -> str:
    """A setting whose value is taken as it stands: brackets, commas and `${` of a prompt mean nothing to Hydra then."""
    key, _, value = word.partition("=")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    return f'{key}="{escaped}"'


def prepare(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul prepare`."""
    from data_pipeline.config import PrepareConfig

    config = validate(PrepareConfig, compose("prepare", overrides, config_dir))
    from data_pipeline.prepare import prepare as run
    from train.outcome import ExitCode
    from train.stoppable import Stopped, stoppable

    try:
        with stoppable():
            run(config)
    except Stopped as request:
        print(f"longhaul prepare: stopped by {request}; the same command goes on behind what is done", file=sys.stderr)
        return ExitCode.RESUMABLE
    return 0


def generate(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul generate`."""
    from train.checkpoint.manifest import resolve_checkpoint
    from train.config.generate import GenerateConfig

    words = [literal(word) if word.startswith(("prompt=", "system=")) else word for word in overrides]
    config = validate(GenerateConfig, compose("generate", words, config_dir))
    resolve_checkpoint(config.checkpoint)  # a wrong folder is told before seconds go into importing torch
    from train.stages.generate import run

    return run(config)


def evaluate(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul evaluate`."""
    from train.evaluate.checks import check, configure
    from train.outcome import ExitCode
    from train.stoppable import Stopped, stoppable

    config = configure(overrides, config_dir)
    check(config)
    from train.stages.evaluate import run

    try:
        with stoppable():
            return run(config)
    except Stopped as request:
        print(f"longhaul evaluate: stopped by {request}; nothing was kept, the same command begins anew", file=sys.stderr)
        return ExitCode.RESUMABLE


def import_(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul import`."""
    from train.config.hf_import import ImportConfig

    config = validate(ImportConfig, compose("import", overrides, config_dir))
    from train.stages.hf_import import run

    return _convert("import", lambda: run(config))


def export(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul export`."""
    from train.checkpoint.manifest import resolve_checkpoint
    from train.config.export import ExportConfig

    config = validate(ExportConfig, compose("export", overrides, config_dir))
    resolve_checkpoint(config.checkpoint)  # a wrong folder is told before seconds go into importing torch
    from train.stages.export import run

    return _convert("export", lambda: run(config))


def _convert(verb: str, run: Callable[[], int]) -> int:
    """Run a conversion; one that is stopped, or finds the disk full, keeps the files that are whole."""
    from train.outcome import ExitCode
    from train.stoppable import Stopped, stoppable

    goes_on = "the same command goes on behind the files that are whole"
    try:
        with stoppable():
            return run()
    except Stopped as request:
        print(f"longhaul {verb}: stopped by {request}; {goes_on}", file=sys.stderr)
        return ExitCode.RESUMABLE
    except OSError as error:
        raise UserError(f"{error.filename or 'out'}: {error.strerror or error}; {goes_on}") from None


def baseline(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul baseline`."""
    from tools.baseline import BaselineConfig, run

    return run(validate(BaselineConfig, compose("baseline", overrides, config_dir)))


def stdlib_tasks(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul stdlib-tasks`."""
    from tools.stdlib_tasks import StdlibTasksConfig, run

    return run(validate(StdlibTasksConfig, compose("stdlib_tasks", overrides, config_dir)))


def task_baseline(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul task-baseline`."""
    from tools.task_baseline import TaskBaselineConfig, run
    from train.config.evaluation import VERBATIM

    return run(validate(TaskBaselineConfig, compose("task_baseline", overrides, config_dir, verbatim=VERBATIM)))


def inspect(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul inspect`."""
    from tools.inspect_step import InspectConfig, run

    return run(validate(InspectConfig, compose("inspect", overrides, config_dir)))


def report(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul report`."""
    from tools.report import ReportConfig, run

    return run(validate(ReportConfig, compose("report", overrides, config_dir)))


BENCHES = {  # what is measured: module, its settings, root file
    "attention": ("tools.bench_attention", "BenchConfig", "bench_attention"),
    "checkpoint": ("tools.bench_checkpoint", "CheckpointBenchConfig", "bench_checkpoint"),
    "likelihood": ("tools.bench_likelihood", "LikelihoodBenchConfig", "bench_likelihood"),
    "loader": ("tools.bench_loader", "LoaderBenchConfig", "bench_loader"),
    "startup": ("tools.bench_startup", "BenchConfig", "bench"),
    "step": ("tools.bench_step", "StepBenchConfig", "bench_step"),
}


def bench_of(what: str) -> tuple[str, str, str]:
    """Module, settings and root file of a bench. Raises UserError for one that is not there."""
    if what not in BENCHES:
        raise UserError(f"{what or '(nothing)'}: no such bench; there is: longhaul bench {' | '.join(BENCHES)}")
    return BENCHES[what]


def bench(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul bench WHAT`."""
    what, *rest = overrides or [""]
    module_name, schema, root = bench_of(what)
    module = importlib.import_module(module_name)
    return module.run(validate(getattr(module, schema), compose(root, rest, config_dir)))
