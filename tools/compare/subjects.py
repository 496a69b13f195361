"""What is compared: a run as far as it has come, or one checkpoint of it, with all that its folder says. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from conf.compose import read_config
from conf.errors import ConfigError, UserError
from data_pipeline.encoded_rows import read_encoded
from data_pipeline.facts import inspect_sources
from tools.curves import COLOURS
from tools.history import History
from train.checkpoint.manifest import MANIFEST, Manifest, published, read_manifest, resolve_checkpoint
from train.checkpoint.settings import read_settings
from train.config.finetune import FinetuneConfig
from train.config.imported import ImportedConfig
from train.config.pretrain import PretrainConfig
from train.config.runs import RUNS
from train.config.settings import RunSettings
from train.groundwork.finetuning import ROWS_FOLDER
from train.metrics.jsonl import FILE_NAME

LETTERS = "ABCDEFGH"
MOST_SUBJECTS = min(len(LETTERS), len(COLOURS))  # more would share a colour in a chart
TOKENIZER = "tokenizer/tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Named:
    """One subject as the command line names it."""

    kind: Literal["run", "checkpoint"]
    """run: as far as it has come; checkpoint: that step of it, or weights that were imported."""
    path: str
    """Folder."""

    def __str__(self) -> str:
        return f"{self.kind}={self.path}"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A run or a checkpoint that was found."""

    letter: str
    """A, B, C ... in the order that they were given."""
    name: str
    """What it is called in tables and legends; no two have the same."""
    folder: Path
    """The run's folder, or the checkpoint's."""
    run_dir: Path | None
    """Folder of the run that it is of; None: an imported checkpoint, or one that was moved away from its run."""
    settings: RunSettings | ImportedConfig
    record: dict[str, Any] = field(default_factory=dict)
    """run.json."""
    history: History = field(default_factory=History)
    """All records of the run; those behind `until` do not count."""
    checkpoint: Path | None = None
    """The checkpoint that was named, or the newest of the run."""
    manifest: Manifest | None = None
    """That of `checkpoint`."""
    until: int | None = None
    """Step of a checkpoint that was named; None: a whole run."""

    @property
    def label(self) -> str:
        """Letter and name."""
        return f"{self.letter} {self.name}"

    @property
    def colour(self) -> str:
        """Its colour in every chart."""
        return COLOURS[LETTERS.index(self.letter)]

    @property
    def evaluations_root(self) -> Path:
        """The folder that has its evaluations below it."""
        return self.folder if self.run_dir is None else self.run_dir

    @property
    def step(self) -> int | None:
        """The last step that counts; None where nothing says."""
        if self.until is not None:
            return self.until
        steps = [int(self.history.last["step"])] if self.history.last else []
        return max(steps + ([self.manifest.step] if self.manifest else []), default=None)

    @property
    def tokens(self) -> int | None:
        """Tokens that were trained on; None where nothing says."""
        if self.until is None and "tokens" in self.history.last:
            return int(self.history.last["tokens"])
        return None if self.manifest is None else self.manifest.tokens

    @property
    def evaluations(self) -> dict[str, dict[str, dict[int, float]]]:
        """Name of what was held out, mostly empty -> figure -> step -> value, of the steps that count."""
        return {
            name: {
                figure: {step: value for step, value in values.items() if self.until is None or step <= self.until}
                for figure, values in figures.items()
            }
            for name, figures in self.history.evaluations.items()
        }

    @property
    def place(self) -> tuple[Path, int | None]:
        """Where its state is, by which the same is known under another name."""
        return self.evaluations_root.resolve(), self.step

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a field of the training records that count."""
        steps_N, values_N = self.history.column(name)
        counting_N = np.full(len(steps_N), True) if self.until is None else steps_N <= self.until
        return steps_N[counting_N], values_N[counting_N]

    def newest(self, name: str) -> float | None:
        """Value of a field in the newest record that counts; None where it was not recorded."""
        if self.until is None:
            value = self.history.totals.get(name)
            return None if value is None else float(value)
        values_N = self.column(name)[1]
        return float(values_N[-1]) if len(values_N) else None

    @cached_property
    def tokenizer_hash(self) -> str | None:
        """SHA-256 of tokenizer.json; None where there is neither a checkpoint nor the corpus any more."""
        if self.manifest is not None and TOKENIZER in self.manifest.files:
            return self.manifest.files[TOKENIZER].sha256
        return self._corpus[0]

    @cached_property
    def data_fingerprint(self) -> str | None:
        """Identity of the data that it was trained on; None where nothing says, and for what was not trained here."""
        if isinstance(self.settings, ImportedConfig):
            return None
        return self._corpus[1] if self.manifest is None else self.manifest.data_fingerprint

    @cached_property
    def _corpus(self) -> tuple[str | None, str | None]:
        """Hash of the tokenizer and fingerprint of the corpus, or of the rows, as it lies there now."""
        try:
            if isinstance(self.settings, FinetuneConfig) and self.run_dir is not None:
                rows = read_encoded(self.run_dir / ROWS_FOLDER, verify="sizes")
                return rows.tokenizer_sha256, rows.fingerprint
            if not isinstance(self.settings, PretrainConfig):
                return None, None
            facts = inspect_sources(self.settings.data)
        except UserError:  # it was moved or removed since, which takes nothing from the run
            return None, None
        return facts.tokenizer_sha256, facts.fingerprint


def read_subjects(named: Sequence[Named]) -> list[Subject]:
    """Find all that was named, in order.

    Raises UserError for fewer than two or too many, for a folder that is not what it is called, and for the same twice.
    """
    if len(named) < 2:
        given = f"only {named[0]} is given" if named else "nothing is given"
        raise ConfigError(
            [f"run, checkpoint: {given}, and two or more are compared; give run=runs/A run=runs/B, or checkpoint=..."]
        )
    if len(named) > MOST_SUBJECTS:
        raise ConfigError(
            [f"run, checkpoint: {len(named)} are given, and a chart can tell {MOST_SUBJECTS} apart; leave some out"]
        )
    if empty := [str(one) for one in named if not one.path]:
        raise ConfigError([f"{text}: needs a folder, such as runs/first" for text in empty])
    histories: dict[Path, History] = {}
    found: list[Subject] = []
    for one, letter in zip(named, LETTERS, strict=False):
        subject = (_read_run if one.kind == "run" else _read_checkpoint)(one, letter, histories)
        for before, earlier in zip(found, named, strict=False):
            if before.place == subject.place:
                raise UserError(f"{one}: is the same as {earlier}, which is given too; name another run, or another step of it")
        found.append(subject)
    return _told_apart(found)


def _read_run(one: Named, letter: str, histories: dict[Path, History]) -> Subject:
    folder = Path(one.path)
    if not folder.is_dir():
        raise UserError(f"{one}: no such folder; give the folder of a run, such as runs/first")
    if (folder / MANIFEST).is_file():
        raise UserError(f"{one}: is no run; if it is a checkpoint, give checkpoint={one.path}")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{one}: holds no config.yaml, so it is no run; give the folder of a run, such as runs/first")
    settings = read_config(RUNS, folder / "config.yaml")
    checkpoint = next(reversed(published(folder / "checkpoints")), None)
    return Subject(
        letter=letter,
        name=settings.run.name,
        folder=folder,
        run_dir=folder,
        settings=settings,
        record=_record(folder),
        history=_history(folder, histories),
        checkpoint=checkpoint,
        manifest=None if checkpoint is None else read_manifest(checkpoint),
    )


def _read_checkpoint(one: Named, letter: str, histories: dict[Path, History]) -> Subject:
    folder = resolve_checkpoint(one.path)
    manifest = read_manifest(folder)
    settings = read_settings(folder, manifest)
    above = folder.resolve().parent
    run_dir = folder.parent.parent if above.name == "checkpoints" and (above.parent / "config.yaml").is_file() else None
    imported = isinstance(settings, ImportedConfig)
    return Subject(
        letter=letter,
        name=folder.resolve().name if imported else f"{settings.run.name} step {manifest.step:,}",
        folder=folder,
        run_dir=run_dir,
        settings=settings,
        record={} if run_dir is None else _record(run_dir),
        history=History() if run_dir is None else _history(run_dir, histories),
        checkpoint=folder,
        manifest=manifest,
        until=manifest.step,
    )


def _record(run_dir: Path) -> dict[str, Any]:
    """run.json; empty where there is none: all it adds is versions."""
    path = run_dir / "run.json"
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); put back what the run wrote, or remove it") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: damaged, it does not describe a run; put back what the run wrote, or remove it")
    return record


def _history(run_dir: Path, histories: dict[Path, History]) -> History:
    """The records of a run, read once however many of its checkpoints are compared."""
    path = run_dir / FILE_NAME
    if path not in histories:
        histories[path] = History.read(path) if path.exists() else History()
    return histories[path]


def _told_apart(found: list[Subject]) -> list[Subject]:
    """The same, those that would have one name called by their folders."""
    names = [subject.name for subject in found]
    return [replace(subject, name=str(subject.folder)) if names.count(subject.name) > 1 else subject for subject in found]
