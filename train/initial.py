"""A run that begins with the weights of a checkpoint: where its model comes from, and whether the two fit. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from conf.compose import Composition, compose, to_plain, validate
from conf.errors import UserError
from data_pipeline.facts import CorpusFacts
from data_pipeline.rows_config import RowsConfig
from train.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    check_files,
    published,
    read_manifest,
    resolve_checkpoint,
)
from train.checkpoint.publication import BEST
from train.checkpoint.settings import read_settings
from train.config.finetune import FinetuneConfig
from train.config.imported import ImportedConfig
from train.config.model import ModelConfig
from train.config.preference import PreferenceConfig
from train.config.pretrain import PretrainConfig
from train.config.runs import RUNS
from train.config.settings import RunSettings
from train.config.training import RunConfig
from train.model.cost import LABEL_HEAD, OUTPUT_HEAD, parameter_shapes

TOKENIZER = "tokenizer/tokenizer.json"
BASE_FOLDER = "base"
"""Of a run that trains a part of its model: a copy of the checkpoint that holds the rest."""
VERBATIM = {"finetune": ("task.prompt", "task.target_prefix", "data.system")}
"""Fields whose texts are taken as they are."""


def configure(
    overrides: Sequence[str],
    config_dir: str | None = None,
    *,
    stage: str = "pretrain",
    awaited: Mapping[Path, RunSettings] = MappingProxyType({}),
) -> RunSettings:
    """The configuration that the words of a verb make; with initial_checkpoint its model is that checkpoint's.

    Single settings of the model may be given beside it, such as model.dropout=0.1. awaited: settings of runs that end before
    this one starts, by their resolved folders: which checkpoint of theirs it begins with is found out then.
    Raises ConfigError with all that is wrong, and UserError when the checkpoint cannot be read.
    """
    overrides = spelled_out(stage, overrides)
    composed = compose(stage, overrides, config_dir, verbatim=VERBATIM.get(stage, ()))
    places = [composed.tree.get("initial_checkpoint"), *_run_of(composed.tree)]
    if all(isinstance(place, str) for place in places):  # else validation says what is wrong
        composed = _with_its_model(composed, overrides, config_dir, stage=stage, awaited=awaited)
    return validate(RUNS[stage], composed)


def spelled_out(stage: str, words: Sequence[str]) -> list[str]:
    """The words, checkpoint=FOLDER of a fine-tuning as initial_checkpoint: the former is the section of a run's own ones."""
    short = "checkpoint="
    if stage != "finetune":
        return list(words)
    return [f"initial_{word}" if word.startswith(short) and word != short else word for word in words]


def _run_of(tree: Mapping[str, Any]) -> tuple[Any, Any]:
    """Folder and name of the run, not validated yet."""
    run, usual = tree.get("run") or {}, RunConfig()
    return run.get("folder", usual.folder), run.get("name", usual.name)


def _with_its_model(
    composed: Composition,
    overrides: Sequence[str],
    config_dir: str | None,
    *,
    stage: str,
    awaited: Mapping[Path, RunSettings],
) -> Composition:
    first, base = _first_model(composed.tree, awaited)
    model = to_plain(base)
    problems = list(composed.problems)
    rule = f"with initial_checkpoint={first} the model is that checkpoint's"
    for word in overrides:
        name, _, value = word.lstrip("+~").partition("=")
        if name == "model":
            problems.append(f"model={value}: {rule}; leave it out, single settings such as model.dropout may be given")
        elif name.startswith("model."):
            try:
                given = _look_up(composed.tree, name.split("."))
            except (KeyError, TypeError):  # a word that composition could not take, and has told of; or one that takes away
                continue
            if isinstance(given, dict):
                problems.append(f"{name}={value}: {rule}; give its fields one by one, such as {name}.{next(iter(given))}=...")
            else:
                _put(model, name.split(".")[1:], given)
        elif name == "experiment" and value != "null":
            usual, theirs = (compose(stage, words, config_dir).tree.get("model") for words in ([], [word]))
            if usual != theirs:
                problems.append(f"experiment={value}: sets a model, and {rule}; give an experiment without one")
    problems += _pair_problems(composed.tree, overrides, model)
    tree = composed.tree | {"initial_checkpoint": first, "model": model}
    if stage == "finetune":
        usual = {"sequence_length": min(RowsConfig.sequence_length, base.max_positions)}
        tree["data"] = usual | (tree.get("data") or {})
    return replace(composed, tree=tree, problems=tuple(problems))


def _first_model(tree: Mapping[str, Any], awaited: Mapping[Path, RunSettings]) -> tuple[str, ModelConfig]:
    """Which checkpoint the run begins with, and its model."""
    given, (folder, name) = tree["initial_checkpoint"], _run_of(tree)
    run_dir = Path(folder) / name
    before = awaited_run(given, awaited)
    if before is not None and newest_whole(run_dir / "checkpoints")[0] is None:
        return given, before.model
    begins = beginning(given, run_dir)
    return begins.first, begins.settings.model


def awaited_run(given: str, awaited: Mapping[Path, RunSettings]) -> RunSettings | None:
    """Settings of the run of `awaited` that initial_checkpoint names, itself or its best; None: it names none of them."""
    return awaited.get(_home(given).resolve())


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Where a run takes its model from."""

    first: str
    """The checkpoint that it begins with; it may be gone once the run has one of its own."""
    source: Path
    """The run's own newest checkpoint; of a run without any, the first."""
    settings: RunSettings | ImportedConfig
    """Those in `source`."""

    @property
    def goes_on(self) -> bool:
        """Whether the run has a checkpoint of its own."""
        return self.source != Path(self.first)


def beginning(given: str, run_dir: Path) -> Beginning:
    """Where a run takes its model from, which is told to begin with `given`: a checkpoint, a run, or the best of a run.

    What the run has of its own comes first: what was given may be gone by then, or may have newer ones beside it.
    Raises UserError when neither holds a checkpoint.
    """
    own, _ = newest_whole(run_dir / "checkpoints")
    if own is not None:
        settings = read_settings(own, read_manifest(own))
        recorded = getattr(settings, "initial_checkpoint", None)
        first = recorded if recorded is not None and _is_within(recorded, given, run_dir) else given
        return Beginning(first=first, source=own, settings=settings)
    try:
        source = initial_folder(given)
    except UserError as error:
        source = run_dir / BASE_FOLDER  # the same checkpoint, where the run has kept it
        if not (source / MANIFEST).is_file():
            if not (run_dir / "config.yaml").exists():
                raise
            raise UserError(
                f"{error}. {run_dir} was started from it and has no checkpoint of its own that can be read, so it has to begin "
                f"with that one again: put it back, or give the place where it is now"
            ) from None
    return Beginning(first=str(source), source=source, settings=read_settings(source, read_manifest(source)))


def _is_within(recorded: str, given: str, run_dir: Path) -> bool:
    """Whether a checkpoint is what was given, or of the run that was; or the run's own copy of what it began with."""
    return any(Path(recorded).resolve().is_relative_to(place.resolve()) for place in (_home(given), run_dir))


def _home(given: str) -> Path:
    """The run whose best was given; of anything else, itself."""
    return Path(given).parent if Path(given).name == BEST else Path(given)


def newest_whole(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint below `root` whose small files are what was written, and what is wrong with those after it.

    Weights are left to the ranks, which verify all of it.
    """
    damaged: list[str] = []
    for folder in reversed(published(root)):
        try:
            manifest = read_manifest(folder)
            check_files(folder, manifest, [name for name in manifest.files if not name.endswith(".safetensors")])
            return folder, damaged
        except DamagedCheckpoint as error:
            damaged.append(str(error))
    return None, damaged


def _pair_problems(tree: Mapping[str, Any], overrides: Sequence[str], model: Mapping[str, Any]) -> list[str]:
    """Settings of the model that were asked for, and are otherwise where pairs of answers are compared."""
    if (tree.get("task") or {}).get("kind") != "preference":
        return []
    asked = {word.lstrip("+~").partition("=")[0] for word in overrides}
    dropout = (tree.get("preference") or {}).get("dropout", PreferenceConfig.dropout)
    problems = []
    if "model.z_loss" in asked and model["z_loss"]:
        problems.append(f"model.z_loss={model['z_loss']}: the loss of pairs has no z-loss; leave it out with task=preference")
    if "model.dropout" in asked and dropout is not None and model["dropout"] != dropout:
        problems.append(
            f"model.dropout={model['dropout']}: with task=preference the model has preference.dropout={dropout}; leave it out, "
            f"or give preference.dropout={model['dropout']}"
        )
    return problems


def _look_up(tree: Any, path: Sequence[str]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *above, last = path
    for part in above:
        inner = tree.get(part)
        tree[part] = inner if isinstance(inner, dict) else {}
        tree = tree[part]
    tree[last] = value


def initial_folder(text: str) -> Path:
    """The checkpoint that `initial_checkpoint` means: itself, or the newest of a run's folder."""
    try:
        return resolve_checkpoint(text)
    except UserError as error:
        raise UserError(str(error).replace("checkpoint=", "initial_checkpoint=", 1)) from None


def check_initial(config: PretrainConfig, facts: CorpusFacts) -> list[str]:
    """What a fresh run begins with, as lines for a person; nothing for one that begins with random weights.

    Raises UserError when the checkpoint's tensors are not the model's, or the corpus was encoded by another tokenizer.
    """
    if config.initial_checkpoint is None:
        return []
    folder = initial_folder(config.initial_checkpoint)
    manifest = read_manifest(folder)
    expected = parameter_shapes(config.model)
    _compare(config.initial_checkpoint, {name: tensor.shape for name, tensor in manifest.tensors.items()}, expected)
    tokenizer = manifest.files.get(TOKENIZER)
    if tokenizer is not None and tokenizer.sha256 != facts.tokenizer_sha256:
        raise UserError(
            f"data.sources={', '.join(str(source.path) for source in facts.sources)}: encoded by another tokenizer than the "
            f"checkpoint's, so its embedding would mean other words; prepare the corpus with "
            f"tokenizer=hf tokenizer.path={folder / 'tokenizer'}"
        )
    return [f"begins with       {folder}: its model and its weights, a fresh optimizer"]


def check_initial_model(config: FinetuneConfig) -> list[str]:
    """What a fresh fine-tuning run begins with, as lines for a person.

    Raises UserError when the checkpoint's tensors are not the model's, the head apart where the model tells labels apart.
    """
    folder = initial_folder(config.initial_checkpoint)
    theirs = read_settings(folder, read_manifest(folder)).model
    heads = head_changes(theirs, config.model)
    _compare(
        config.initial_checkpoint,
        {name: shape for name, shape in parameter_shapes(theirs).items() if name not in heads.left_out},
        {name: shape for name, shape in parameter_shapes(config.model).items() if name not in heads.new},
    )
    head = f"; a fresh head for {len(config.model.labels)} labels" if heads.new else ""
    lines = [f"begins with      {folder}: its model, weights and tokenizer, a fresh optimizer{head}"]
    if config.pairs is not None and theirs.z_loss:
        lines.append(f"                 its z-loss of {theirs.z_loss:g} is off: the loss of pairs has none")
    if config.pairs is not None and theirs.dropout != config.model.dropout:
        lines.append(f"                 its dropout of {theirs.dropout:g} is {config.model.dropout:g} (preference.dropout)")
    return lines


@dataclass(frozen=True, kw_only=True)
class HeadChanges:
    """Logical names of the tensors of two heads that are exchanged."""

    new: tuple[str, ...] = ()
    """Tensors of the model's head: they begin at random."""
    left_out: tuple[str, ...] = ()
    """Tensors of the checkpoint's head: they are passed over. Both may have the same names, for other labels."""


def head_changes(theirs: ModelConfig, model: ModelConfig) -> HeadChanges:
    """Which head is exchanged where a model with other labels begins with a checkpoint; nothing where they are the same.

    Raises UserError for a language model that is to begin with a model that tells labels apart: its own head is gone.
    """
    if theirs.labels == model.labels:
        return HeadChanges()
    if not model.labels:
        raise UserError(
            f"initial_checkpoint: tells the labels {', '.join(theirs.labels)} apart and writes no text; give a language model"
        )
    heads = (OUTPUT_HEAD, LABEL_HEAD)
    return HeadChanges(
        new=tuple(name for name in parameter_shapes(model) if name in heads),
        left_out=tuple(name for name in parameter_shapes(theirs) if name in heads),
    )


def _compare(place: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in dict.fromkeys([*expected, *found]):
        if expected.get(name) != found.get(name):
            shapes = [" x ".join(map(str, shape)) if shape else "absent" for shape in (found.get(name), expected.get(name))]
            raise UserError(
                f"initial_checkpoint={place}: {name} is {shapes[0]} there, and {shapes[1]} in the model; "
                f"settings of the model that change its tensors cannot be given beside a checkpoint"
            )
