"""What a fine-tuning run reads and begins with: labelled rows, encoded once for all ranks, and the weights of a checkpoint."""

from __future__ import annotations

import atexit
import math
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from conf.errors import ConfigError, UserError
from data_pipeline.chat_files import copy_for_answers
from data_pipeline.config import Verify
from data_pipeline.encoded_rows import EncodedRows, read_encoded
from data_pipeline.preferences import ROWS_OF_A_PAIR
from data_pipeline.row_preparation import prepare_rows
from data_pipeline.shown_example import shown_example
from data_pipeline.tokenizer import Tokenizer
from train.checkpoint.manifest import MANIFEST, read_manifest
from train.config.finetune import FinetuneConfig
from train.config.imported import ImportedConfig
from train.config.pretrain import PretrainConfig
from train.config.settings import RunSettings
from train.config.training import BudgetConfig
from train.groundwork.findings import Findings
from train.initial import BASE_FOLDER, Beginning, beginning, check_initial_model
from train.model.adapters import problems_of

ROWS_FOLDER = "rows"
TOKENIZER_FOLDER = "tokenizer"


def look_into(config: FinetuneConfig) -> Findings[FinetuneConfig]:
    """Read the rows and encode them, unless the run's folder has them from before; see what the run begins with.

    Of the checkpoint that it begins with nothing is read once the run has one of its own.
    Raises UserError for rows, a checkpoint or a tokenizer that do not fit.
    """
    run_dir = Path(config.run.folder) / config.run.name
    begins = beginning(config.initial_checkpoint, run_dir)
    config = replace(config, initial_checkpoint=begins.first)
    _check_base(config, run_dir)
    config, rows = _with_rows(config, begins.settings, begins.source / TOKENIZER_FOLDER)
    return Findings(
        config=config,
        fingerprint=rows.fingerprint,
        lines=_lines(rows, begins.source / TOKENIZER_FOLDER),
        train_tokens=rows.num_sequences("train") * config.sequence_length,
        other_data=lambda newest: (
            f"task.data: {newest} was trained on other rows, or they were encoded otherwise (task.* and data.*), so its order "
            f"of samples cannot go on; put them back, or start another run with run.name=..."
        ),
        begin=lambda: check_initial_model(config),
        check_plan=lambda _: None,
        make_ready=lambda folder: _make_ready(config, rows, begins, folder),
    )


def look_ahead(config: FinetuneConfig, before: RunSettings) -> tuple[FinetuneConfig, tuple[str, ...]] | None:
    """Read the rows of a run that begins with what another one, with the settings `before`, has yet to write: its settings with
    all that follows from them, and lines for a person. None while the tokenizer of that run is not there.

    Raises UserError for rows and settings that do not fit.
    """
    if isinstance(before, PretrainConfig):
        places = [Path(source.path) for source in before.data.sources[:1]]
    else:
        places = [Path(before.run.folder) / before.run.name]
    found = [place / TOKENIZER_FOLDER for place in places if (place / TOKENIZER_FOLDER).is_dir()]
    if not found or before.model.vocab_size is None:
        return None
    config, rows = _with_rows(config, before, found[0])
    return config, _lines(rows, found[0])


def needs_base(config: FinetuneConfig) -> bool:
    """Whether some of the model stays as it was, so that the run's checkpoints stand on the one it began with."""
    return config.method.lora is not None or bool(config.method.frozen)


def base_of(config: FinetuneConfig, run_dir: Path) -> Path | None:
    """The checkpoint that holds what the run does not train; None: it trains all."""
    if not needs_base(config):
        return None
    kept = run_dir / BASE_FOLDER
    return kept if (kept / MANIFEST).is_file() else Path(config.initial_checkpoint)


def kept_rows(run_dir: Path, *, verify: Verify) -> EncodedRows:
    """The rows of a run, with its own tokenizer in the place of the one that they were encoded with. verify: see RowsConfig."""
    return replace(read_encoded(run_dir / ROWS_FOLDER, verify=verify), tokenizer_folder=run_dir / TOKENIZER_FOLDER)


def _of_pairs(config: FinetuneConfig) -> dict[str, float]:
    """What of the model is otherwise where pairs are compared: their loss has no other part."""
    if config.pairs is None:
        return {}
    return {"z_loss": 0.0} | ({} if config.pairs.dropout is None else {"dropout": config.pairs.dropout})


def _with_rows(
    config: FinetuneConfig, theirs: RunSettings | ImportedConfig, tokenizer_folder: Path
) -> tuple[FinetuneConfig, EncodedRows]:
    """The rows, and the settings with what follows from them and from those of the checkpoint that the run begins with."""
    opens = isinstance(theirs, ImportedConfig) or bool(getattr(theirs, "opening", False))
    config = replace(
        config,
        model=replace(config.model, vocab_size=config.model.vocab_size or theirs.model.vocab_size),
        opening=opens if config.opening is None else config.opening,
    )
    rows = _encoded(config, tokenizer_folder, Path(config.run.folder) / config.run.name)
    config = replace(
        config,
        model=replace(config.model, labels=rows.labels, **_of_pairs(config)),
        budget=_in_steps(config, sequences=rows.num_sequences("train")),
    )
    problems = [f"method.{problem}" for problem in problems_of(config.model, lora=config.adapter, frozen=config.frozen)]
    if problems := [*problems, *_held_out_problems(config, rows)]:
        raise ConfigError(problems)
    return config, rows


def _held_out_problems(config: FinetuneConfig, rows: EncodedRows) -> list[str]:
    """Settings of what is measured on the way that these rows, or the model, do not allow."""
    if not rows.num_rows("validation"):
        given = {"evaluate.patience": config.evaluate.patience, "scoring.metric": config.scoring.metric}
        way_out = "no row is held out to measure; give task.validation or data.validation_fraction"
        return [f"{name}={value}: {way_out}" for name, value in given.items() if value is not None]
    writes = config.task.kind in ("generation", "dialogue") and config.scoring.max_rows != 0
    if writes and config.task.max_new_tokens > config.model.max_positions:
        return [
            f"task.max_new_tokens={config.task.max_new_tokens}: leaves no room for a prompt, as the model reads "
            f"model.max_positions={config.model.max_positions} tokens; give less"
        ]
    return []


def _check_base(config: FinetuneConfig, run_dir: Path) -> None:
    base = base_of(config, run_dir)
    if base is not None and not (base / MANIFEST).is_file():
        raise UserError(
            f"initial_checkpoint={base}: is gone, and {run_dir / BASE_FOLDER} too; the checkpoints of {run_dir} hold what it "
            f"trains, and one of these has to hold the rest: put it back, or start another run with run.name=..."
        )


def _encoded(config: FinetuneConfig, tokenizer_folder: Path, run_dir: Path) -> EncodedRows:
    """The rows; those that the run's folder does not have lie in a temporary one, which goes with the process: what is shown or
    refused leaves a run as it is."""
    tokenizer = Tokenizer(tokenizer_folder)
    return prepare_rows(
        config.task,
        config.data,
        tokenizer=tokenizer,
        opening=tuple(tokenizer.opening()) if config.opening else (),
        end_of_document=tokenizer.end_of_document()[0],
        vocab_size=config.model.vocab_size,
        seed=config.run.seed,
        folders=[run_dir / ROWS_FOLDER, _temporary() / "-".join(run_dir.resolve().parts[1:])],
    )


@cache
def _temporary() -> Path:
    """A folder that is gone when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="longhaul-rows-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _in_steps(config: FinetuneConfig, *, sequences: int) -> BudgetConfig:
    """The budget, epochs as the steps that they are, or the tokens where steps grow on the way."""
    if config.budget.epochs is None:
        return config.budget
    if config.batch.ramp_start is not None:
        tokens = math.ceil(config.budget.epochs * sequences) * config.sequence_length
        return replace(config.budget, epochs=None, tokens=tokens)
    steps = math.ceil(config.budget.epochs * sequences / config.batch.sequences)
    return replace(config.budget, epochs=None, steps=max(1, steps))


def _lines(rows: EncodedRows, tokenizer_folder: Path) -> tuple[str, ...]:
    return (*_report_lines(rows), *_example_lines(rows, tokenizer_folder))


def _report_lines(rows: EncodedRows) -> list[str]:
    first, *others = rows.report.lines()
    return [f"rows             {first}", *(f"                 {line}" for line in others)]


def _example_lines(rows: EncodedRows, tokenizer_folder: Path) -> list[str]:
    tokenizer, colour = Tokenizer(tokenizer_folder), sys.stdout.isatty()
    first = range(ROWS_OF_A_PAIR if rows.kind == "preference" else 1)
    examples = [shown_example(rows, tokenizer, colour=colour, row=row) for row in first]
    titles = ["first example, what is learned of it marked:", "and the answer that is not preferred:"]
    return [
        line
        for title, example in zip(titles, examples, strict=False)
        for line in (title, *(f"  | {part}" for part in example.splitlines()))
    ]


def _make_ready(config: FinetuneConfig, rows: EncodedRows, begins: Beginning, run_dir: Path) -> None:
    """Put the rows, the tokenizer with what the model learns to end its answers with, and the checkpoint that frozen weights
    come from into the run's folder."""
    place, tokenizer, base = (run_dir / name for name in (ROWS_FOLDER, TOKENIZER_FOLDER, BASE_FOLDER))
    if rows.folder != place:
        _put(rows.folder, place)
        shutil.rmtree(rows.folder, ignore_errors=True)  # or they would lie there twice for as long as the run lasts
    read_encoded(place, verify=config.data.verify, remember=True)
    if not begins.goes_on:  # a start that came to nothing may have left those of another checkpoint
        shutil.rmtree(tokenizer, ignore_errors=True)
    if not tokenizer.exists():
        source = begins.source / TOKENIZER_FOLDER
        copy_for_answers(source, tokenizer, template=rows.template, endings=rows.endings)
    if not needs_base(config) or (begins.goes_on and base.exists()):
        return
    first = Path(config.initial_checkpoint)
    if read_manifest(first).base is None and not _is_copy(base, first):
        _put(first, base, link=True)


def _is_copy(folder: Path, source: Path) -> bool:
    """Whether a folder holds the same checkpoint as another; its manifest has the hashes of all its files."""
    there = folder / MANIFEST
    return there.is_file() and there.read_bytes() == (source / MANIFEST).read_bytes()


def _put(source: Path, place: Path, *, link: bool = False) -> None:
    """Copy a folder in place of what is there; `link`: its files are shared with the source where the file system can."""

    def share(file: str, target: str) -> None:
        try:
            os.link(file, target)
        except OSError:
            shutil.copy2(file, target)

    partial = place.with_name(f".{place.name}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=share if link else shutil.copy2)
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    except OSError as error:
        raise UserError(f"{place}: cannot be written ({error.strerror or error})") from None
