"""A run that begins with the weights of a checkpoint: where its model comes from, and whether the two fit. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.compose import Composition, compose, to_plain, validate
from conf.errors import UserError
from data_pipeline.facts import CorpusFacts
from train.checkpoint.manifest import published, read_manifest, resolve_checkpoint
from train.checkpoint.settings import read_settings
from train.config.model import ModelConfig
from train.config.pretrain import PretrainConfig
from train.config.training import RunConfig
from train.model.cost import parameter_shapes

TOKENIZER = "tokenizer/tokenizer.json"


def configure(overrides: Sequence[str], config_dir: str | None = None) -> PretrainConfig:
    """The configuration that the words of `longhaul pretrain` make; with initial_checkpoint its model is that checkpoint's.

    Single settings of the model may be given beside it, such as model.dropout=0.1.
    Raises ConfigError with all that is wrong, and UserError when the checkpoint cannot be read.
    """
    composed = compose("pretrain", overrides, config_dir)
    if composed.tree.get("initial_checkpoint") is not None:
        composed = _with_its_model(composed, overrides)
    return validate(PretrainConfig, composed)


def _with_its_model(composed: Composition, overrides: Sequence[str]) -> Composition:
    given = composed.tree["initial_checkpoint"]
    model = to_plain(_model_of(composed.tree))
    problems = list(composed.problems)
    for word in overrides:
        name, _, value = word.lstrip("+").partition("=")
        if name == "model":
            problems.append(
                f"model={value}: with initial_checkpoint={given} the model is that checkpoint's; leave it out, single settings "
                f"such as model.dropout may be given"
            )
        elif name.startswith("model."):
            _put(model, name.split(".")[1:], _look_up(composed.tree, name.split(".")))
    return replace(composed, tree=composed.tree | {"model": model}, problems=tuple(problems))


def _model_of(tree: Mapping[str, Any]) -> ModelConfig:
    """Of the newest checkpoint of the run where it has one, so that the first may be gone by then; else of the first."""
    run = RunConfig(**{name: value for name, value in (tree.get("run") or {}).items() if name in ("name", "folder")})
    own = published(Path(run.folder) / run.name / "checkpoints")
    folder = own[-1] if own else initial_folder(tree["initial_checkpoint"])
    return read_settings(folder, read_manifest(folder)).model


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
    found = {name: tensor.shape for name, tensor in manifest.tensors.items()}
    for name in dict.fromkeys([*expected, *found]):
        if expected.get(name) != found.get(name):
            shapes = [" x ".join(map(str, shape)) if shape else "absent" for shape in (found.get(name), expected.get(name))]
            raise UserError(
                f"initial_checkpoint={config.initial_checkpoint}: {name} is {shapes[0]} there, and {shapes[1]} in the model; "
                f"settings of the model that change its tensors cannot be given beside a checkpoint"
            )
    tokenizer = manifest.files.get(TOKENIZER)
    if tokenizer is not None and tokenizer.sha256 != facts.tokenizer_sha256:
        raise UserError(
            f"data.sources={', '.join(str(source.path) for source in facts.sources)}: encoded by another tokenizer than the "
            f"checkpoint's, so its embedding would mean other words; prepare the corpus with "
            f"tokenizer=hf tokenizer.path={folder / 'tokenizer'}"
        )
    return [f"begins with       {folder}: its model and its weights, a fresh optimizer"]
