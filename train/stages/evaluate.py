"""Evaluation: a model, a task, figures with intervals; kept in a folder, shown as a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conf.compose import to_plain
from conf.errors import UserError
from data_pipeline.manifest import read_manifest
from data_pipeline.task_config import TaskConfig, TaskSource
from data_pipeline.texts import open_texts
from train.checkpoint.manifest import write_durably
from train.companions import ranks
from train.config.evaluation import EvaluationConfig
from train.config.finetune import FinetuneConfig
from train.evaluate.checks import score_settings
from train.evaluate.dialogues import with_prompts
from train.evaluate.engines import Engines
from train.evaluate.labels import inputs_of, tell_labels
from train.evaluate.language import cut_texts, measure_texts, reach_of
from train.evaluate.publication import facts_of_the_machine, folder_for, publish, send_to_wandb, table
from train.evaluate.reading import read_rows, words_of
from train.evaluate.rows import encode_rows, label_rows, write_rows
from train.evaluate.subject import Subject, load_engines, open_subject
from train.inference.chat import chat_format
from train.inference.load import check_divisible, resolve_device
from train.parallel import ParallelContext, single_process
from train.precision import resolve_precision
from train.provenance import git_commit, versions
from train.scores.intervals import measure
from train.scores.record import EVALUATION_FILE, Evaluation, Example, Kind, Score
from train.scores.settings import ScoreSettings
from train.scores.sheet import curves, example_scores, signatures, tallies
from train.stoppable import Stopped

VERSIONS_OF = ("sacrebleu", "rouge-score", "lm-eval", "datasets")


@dataclass(kw_only=True)
class Findings:
    """What a task gave."""

    examples: list[Example]
    data: list[dict[str, Any]]
    """name, path, hash and number of examples of each source."""
    counts: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """What was decided where the settings left it open."""
    scores: dict[str, Score] | None = None
    """Of a task that makes its own; None: they are made of the examples."""
    signatures: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Further files of the evaluation, by name, as text."""


def run(config: EvaluationConfig) -> int:
    """Evaluate, keep and show it. Returns the exit code.

    Raises UserError, and keeps nothing, for a model, data or a setting that do not fit.
    """
    started = time.perf_counter()
    device = resolve_device(config.device)
    subject = open_subject(config.checkpoint, config.hf, verify=False, hashed=False)
    if subject.model.labels and config.task.kind == "classification":
        config = replace(config, task=replace(config.task, labels=subject.model.labels, label_texts=()))
    settings = score_settings(config.task)
    check_divisible(subject.model, config.tensor)
    out = folder_for(config, subject.folder, f"{subject.label}-{config.task.name}")
    with _ranks(config, device.type) as context:  # before the data is read, so that all of them read it at the same time
        precision = resolve_precision(config.dtype, context.device.type)
        dtype = context.from_first(precision.precision)
        config = replace(config, verify=config.verify and context.is_first, dtype=dtype)
        if context.is_first:
            subject = open_subject(config.checkpoint, config.hf, verify=config.verify)
        prepared = PREPARERS[config.task.kind](config, subject)  # what is wrong with the data is told before weights are read
        engines = load_engines(subject, context, dtype=config.dtype, batch_tokens=config.batch_tokens)
        _tell(f"dtype            {precision}")
        findings = prepared(engines, context)
        if not context.is_first:
            return 0
    evaluation = _evaluation(config, settings, subject, findings)
    seconds = time.perf_counter() - started
    machine = facts_of_the_machine(device, processes=config.processes, tensor=config.tensor, seconds=seconds)
    evaluation.run.update(machine)
    counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in evaluation.counts.items())
    print(f"{evaluation.name} of {subject.identity['path']}: {counts}; {seconds:.1f} s on {device.type}", file=sys.stderr)
    print("\n".join(table(evaluation)), flush=True)  # before a full disk could take it away
    folder = publish(evaluation, findings.examples, out, more=findings.files)
    print(f"kept in          {folder}", flush=True)
    _report(config, evaluation, folder)
    return 0


def _report(config: EvaluationConfig, evaluation: Evaluation, folder: Path) -> None:
    """To Weights & Biases. A stop while that takes long does not undo an evaluation that is kept."""
    try:
        wandb_id = send_to_wandb(config, evaluation, folder)
    except Stopped as request:
        _tell(f"W&B: not told of it, as {request} asked for a stop")
        return
    if wandb_id is not None:
        evaluation.run["wandb_id"] = wandb_id
        write_durably(folder / EVALUATION_FILE, evaluation.to_json().encode(errors="backslashreplace"))


def _ranks(config: EvaluationConfig, device: str) -> Any:
    if config.processes == 1:
        return nullcontext(single_process(device))
    return ranks(config.processes, device, tensor_parallel=config.tensor)


@contextmanager
def _bar(context: ParallelContext, total: int, title: str, unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on the first rank's terminal."""
    with tqdm(total=total, desc=title, unit=unit, unit_scale=True, disable=None if context.is_first else True) as bar:
        yield bar.update


def _tell(text: str) -> None:
    """What will be done, before it takes long; the companions of the first rank are silent anyway."""
    print(text, file=sys.stderr, flush=True)


# --- the kinds of task: each reads its data, and gives what is to be done with the model in memory ---------------------

Work = Callable[[Engines, ParallelContext], Findings]


def _texts(config: EvaluationConfig, subject: Subject) -> Work:
    task = config.task
    reach = reach_of(task, subject)
    wanted = task.data or _with_text(subject.own_sources(), task)
    if not wanted:
        whose = "a model from elsewhere has no held-out text" if subject.run is None else f"its run has no {task.split} text"
        if isinstance(getattr(subject.reader, "settings", None), FinetuneConfig):
            whose = "its run was fine-tuned on rows, and has no held-out text"
        raise UserError(f"task.data=[]: {whose} of its own; give task.data=[{{path: ...}}]")
    how = {"tokenizer": subject.tokenizer, "end_of_document": subject.end_of_document, "verify": config.verify}
    sources = [open_texts(task, source, **how) for source in wanted]
    pieces = cut_texts(sources, subject, reach=reach, limit=config.limit)
    total = sum(piece.num_targets for piece in pieces)
    names = ", ".join(source.name for source in sources)
    _tell(f"{task.name}: {total:,} targets of {names}, context {reach.context:,}, stride {reach.stride:,}")

    def work(engines: Engines, context: ParallelContext) -> Findings:
        with _bar(context, total, "scoring", "token") as progress:
            examples = measure_texts(pieces, subject, engines.scorer, progress=progress)
        found = [(source.name, source.path, source.hash) for source in sources]
        return Findings(
            examples=examples,
            data=_data(found, examples, limit=config.limit),
            counts={"examples": len(examples), "targets": total},
            settings={"context": reach.context, "stride": reach.stride},
        )

    return work


def _with_text(sources: Sequence[TaskSource], task: TaskConfig) -> list[TaskSource]:
    """The corpora of a run that have text in the split; the others are told of, as the run itself passed them over."""
    found = []
    for source in sources:
        if read_manifest(source.path).num_tokens(task.split):
            found.append(source)
        else:
            _tell(f"{source.label}: has no {task.split} text, it is left out")
    return found


def _rows(config: EvaluationConfig, subject: Subject) -> Work:
    task = config.task
    if subject.model.labels and task.kind == "classification":
        return _by_head(config, subject)
    rows, found = read_rows(task, limit=config.limit)
    more = {}
    if task.kind == "dialogue":
        form = chat_format(subject, getattr(subject.reader, "settings", None))
        rows, subject = with_prompts(rows, form), replace(subject, endings=form.ends)
        more["system"] = form.system
    pairs = encode_rows(rows, task, subject)
    _tell(f"{task.name}: {len(rows):,} {words_of(task, found)}")

    def work(engines: Engines, context: ParallelContext) -> Findings:
        if task.kind == "classification":
            with _bar(context, len(rows) * len(task.labels), "labelling", "label") as progress:
                outcome = label_rows(rows, pairs, task, engines.scorer, progress=progress)
        else:
            with _bar(context, len(rows), "writing", "row") as progress:
                outcome = write_rows(rows, pairs, task, subject, engines=engines, progress=progress)
        return Findings(
            examples=outcome.examples,
            data=_data(found, outcome.examples, limit=config.limit),
            counts={"examples": len(rows), "cut_off": outcome.cut_off},
            settings=more,
        )

    return work


def _by_head(config: EvaluationConfig, subject: Subject) -> Work:
    """The rows of a classification, for a model with a head that tells its labels apart."""
    task = config.task
    rows, found = read_rows(task, limit=config.limit)
    inputs = inputs_of(rows, subject, length=subject.row_length)
    _tell(f"{task.name}: {len(rows):,} {words_of(task, found)}, by the model's own head")

    def work(engines: Engines, context: ParallelContext) -> Findings:
        with _bar(context, len(rows), "labelling", "row") as progress:
            examples = tell_labels(rows, inputs, engines, progress=progress)
        return Findings(
            examples=examples,
            data=_data(found, examples, limit=config.limit),
            counts={"examples": len(rows)},
        )

    return work


def _harness(config: EvaluationConfig, subject: Subject) -> Work:
    from train.harness.run import run_tasks

    def work(engines: Engines, context: ParallelContext) -> Findings:
        outcome = run_tasks(config, subject, engines, context)
        return Findings(
            examples=outcome.examples,
            data=outcome.data,
            counts={"examples": len(outcome.examples)},
            scores=outcome.scores,
            files=outcome.files,
        )

    return work


PREPARERS: dict[str, Callable[[EvaluationConfig, Subject], Work]] = {
    "language": _texts,
    "classification": _rows,
    "generation": _rows,
    "dialogue": _rows,
    "harness": _harness,
}


def _data(found: Sequence[tuple[str, str, str]], examples: Sequence[Example], *, limit: int | None) -> list[dict[str, Any]]:
    """Of a limited evaluation the limit is part of the hash: it is of other data than the whole."""
    cut = "" if limit is None else f":{limit}"
    return [
        {"name": name, "path": path, "hash": f"{hash}{cut}", "examples": sum(one.source == name for one in examples)}
        for name, path, hash in found
    ]


# --- figures ----------------------------------------------------------------------------------------------------------


def _evaluation(config: EvaluationConfig, settings: ScoreSettings, subject: Subject, findings: Findings) -> Evaluation:
    task = config.task
    kind: Kind = "generation" if task.kind == "dialogue" else task.kind  # both are written; preferences do not come here
    scores, points, marks = findings.scores, {}, findings.signatures
    if scores is None:
        findings.examples = [
            replace(example, scores=example.scores | example_scores(kind, example, settings)) for example in findings.examples
        ]
        how = {"resamples": config.resamples, "confidence": config.confidence, "seed": config.seed}
        scores = {
            f"{source}/{name}" if source else name: score
            for source, tally in tallies(kind, findings.examples, settings).items()
            for name, score in measure(tally, **how).items()
        }
        points = curves(kind, findings.examples, settings)
        marks = signatures(kind, findings.examples, settings)
    resolved = to_plain(config)
    resolved["task"] |= findings.settings
    return Evaluation(
        name=task.name,
        kind=kind,
        model=subject.identity,
        data=findings.data,
        config=resolved | {"scores": to_plain(settings)},
        scores=scores,
        curves=points,
        signatures=marks,
        counts=findings.counts,
        run={"git_commit": git_commit(), "versions": versions(VERSIONS_OF)},
    )
