"""A Hugging Face model folder as a checkpoint: weights tensor by tensor, tokenizer as it is. Needs no GPU and no group."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from tqdm import tqdm

from conf.compose import as_yaml
from conf.errors import UserError
from data_pipeline.tokenizer import GENERATION_FILE, Tokenizer, adopt_tokenizer
from train.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    StoredFragment,
    StoredTensor,
    file_facts,
    write_durably,
)
from train.config.imported import ImportedConfig, Origin
from train.config.model import ModelConfig
from train.convert.families import FAMILIES
from train.convert.hf_config import DType, read_model_config
from train.convert.keymap import KeyMap
from train.convert.shards import DTYPE_CODES, Entry, Shard, ShardWriter, plan_shards
from train.convert.weights import OTHER_DTYPE, WeightFiles, WeightFormat
from train.state import TrainState

TORCH_NAMES: dict[torch.dtype, DType] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# All that is fetched from the hub; nothing of it is a program.
PATTERNS = ("*.json", "*.jinja", "tokenizer.model", "spiece.model", "merges.txt", "vocab.txt")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A Hugging Face folder that fits a model of ours: all is known of it but the values."""

    folder: Path
    model: ModelConfig
    files: WeightFiles
    place: dict[str, str]
    """Foreign name -> name in the files."""
    notes: tuple[str, ...]

    @property
    def entries(self) -> dict[str, Entry]:
        """Foreign name -> shape and dtype, without buffers."""
        return {name: self.files.entries[there] for name, there in self.place.items()}

    @functools.cached_property
    def stored(self) -> dict[str, Entry]:
        """Logical name -> what is written of it: as one row, in a dtype that holds all its parts."""
        keymap, stored = KeyMap(self.model), {}
        for name, shape in keymap.logical_shapes.items():
            parts = [self.entries[key].dtype for key in keymap.foreign_names(name)]
            stored[name] = Entry(shape=(prod(shape),), dtype=functools.reduce(torch.promote_types, parts))
        return stored

    @property
    def dtype(self) -> DType:
        """The smallest dtype that holds all weights."""
        return TORCH_NAMES[functools.reduce(torch.promote_types, (entry.dtype for entry in self.stored.values()))]


def inspect_folder(folder: Path, format: WeightFormat) -> Found:
    """Read settings, names and shapes, and no value.

    Raises UserError for a family, a setting or a tensor that our decoder does not have, or that the folder lacks.
    """
    read = read_model_config(folder)
    files = WeightFiles(folder, format)
    place = name_tensors(files, read.model)
    keymap = KeyMap(read.model)
    keymap.check_foreign({name: files.entries[there].shape for name, there in place.items()})
    for name, there in place.items():
        if files.entries[there].dtype is OTHER_DTYPE:
            raise UserError(f"{folder}: {name} is of no dtype of weights; only {', '.join(DTYPE_CODES.values())} are read")
    return Found(folder=folder, model=read.model, files=files, place=place, notes=read.notes)


def name_tensors(files: WeightFiles, model: ModelConfig) -> dict[str, str]:
    """Foreign name -> name in the files: buffers left out, and the copy of a tied head.

    Raises UserError when two tensors mean the same, or a tied head is another matrix than the embedding.
    """
    family = FAMILIES[model.family]
    place: dict[str, str] = {}
    for there in files.entries:
        name = family.canonical(there)
        if name is None:
            continue
        if name in place:
            raise UserError(f"{files.folder}: {place[name]} and {there} both mean {name}")
        place[name] = there
    embedding = next(rule.foreign[0] for rule in family.rules if rule.logical == "embedding.tokens.weight")
    if model.tied_head and {family.head, embedding} <= place.keys():
        _check_copy(files, place, family.head, embedding)
        del place[family.head]
    return place


def _check_copy(files: WeightFiles, place: dict[str, str], head: str, embedding: str) -> None:
    """A tied head may lie in the files as well; raises UserError when it is another matrix than the embedding."""
    if not torch.equal(files.read(place[head]), files.read(place[embedding])):
        raise UserError(
            f"{files.folder}: config.json says tie_word_embeddings=true, but {head} is another matrix than {embedding}; "
            f"transformers would not use it. Set the field to false, or remove the tensor"
        )


def plan_checkpoint(found: Found, *, shard_bytes: int) -> tuple[Shard, ...]:
    """The weight files of the checkpoint."""
    entries = {f"weight/{name}": entry for name, entry in found.stored.items()}
    return plan_shards(entries, shard_bytes=shard_bytes, stem="weights")


def write_checkpoint(found: Found, plan: tuple[Shard, ...], folder: Path, *, origin: Origin) -> None:
    """Make `folder`, which holds the tokenizer, a checkpoint at step 0: weights alone, so that a run begins with a fresh
    optimizer.

    Holds one logical tensor at a time. Raises UserError for values that cannot be read, or are not finite.
    """
    keymap = KeyMap(found.model)
    total = sum(entry.bytes for entry in found.stored.values())
    with (
        ShardWriter(folder, plan) as writer,
        tqdm(total=total, desc="weights", unit="B", unit_scale=True, disable=None) as bar,
    ):
        for name, entry in found.stored.items():
            if writer.wants(f"weight/{name}"):
                whole = keymap.to_logical(name, lambda key: found.files.read(found.place[key]).to(entry.dtype))  # noqa: B023
                writer.write(f"weight/{name}", whole.reshape(-1))
            bar.update(entry.bytes)
    (folder / "config.yaml").write_text(as_yaml(ImportedConfig(model=found.model, origin=origin)), encoding="utf-8")
    (folder / "state.json").write_text(json.dumps(TrainState().to_plain(), indent=1), encoding="utf-8")
    place = {name: shard.file for shard in plan for name in shard.entries}
    listed = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    manifest = Manifest(
        step=0,
        tokens=0,
        layout={"world_size": 1, "tensor": 1, "zero": 1},
        data_fingerprint="",
        files={path.relative_to(folder).as_posix(): file_facts(path) for path in listed},
        tensors={
            name: StoredTensor(
                shape=shape,
                kinds=("weight",),
                fragments=(StoredFragment(file=place[f"weight/{name}"], start=0, length=prod(shape)),),
            )
            for name, shape in keymap.logical_shapes.items()
        },
        written_by="import",
    )
    write_durably(folder / MANIFEST, manifest.to_json().encode())


def take_tokenizer(source: Path, folder: Path, model: ModelConfig) -> None:
    """Put the tokenizer of `source` into `folder`, its files as they are.

    Raises UserError when there is none, or it has ids beyond the model's vocabulary.
    """
    try:
        adopt_tokenizer(source, folder)
    except UserError as error:
        words = str(error).removeprefix(f"tokenizer.path={source}: ")
        raise UserError(f"{source}: {words}; tokenizer=FOLDER takes that of another folder") from None
    if (source / GENERATION_FILE).is_file():
        shutil.copyfile(source / GENERATION_FILE, folder / GENERATION_FILE)
    size = Tokenizer(folder).text_size
    if size > model.vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {size:,} tokens, the model an embedding of {model.vocab_size:,}; it belongs to "
            f"another model. tokenizer=FOLDER takes that of another folder"
        )


def fetch(name: str, *, revision: str | None, format: WeightFormat) -> tuple[Path, str | None]:
    """The folder that `name` means, and its commit on the hub; what lies on the hub is fetched into the cache of the user.

    Raises UserError when there is neither such a folder nor such a model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision={revision}: {name} is a folder here, and has none; leave it out")
        return folder, None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"hf={name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    weights = "*.safetensors" if format == "safetensors" else "*.bin"
    try:
        wanted = {"allow_patterns": [*PATTERNS, weights], "ignore_patterns": ["*/*", "consolidated*"]}  # the same weights again
        found = Path(snapshot_download(name, revision=revision, **wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        words = " ".join(str(error).split())[:300]
        raise UserError(f"hf={name}: no such folder, and the hub gave nothing ({type(error).__name__}: {words})") from None
    return found, found.name
