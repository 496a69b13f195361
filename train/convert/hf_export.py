"""A checkpoint as a Hugging Face model folder: weights tensor by tensor, settings, tokenizer. Needs no GPU and no group."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from conf.errors import UserError
from data_pipeline.io import read_json
from data_pipeline.tokenizer import GENERATION_FILE, Tokenizer
from train.checkpoint.reader import CheckpointReader
from train.config.imported import ImportedConfig
from train.config.model import ModelConfig
from train.convert.hf_config import DType, SpecialIds, check_expressible, generation_config, model_config
from train.convert.keymap import KeyMap
from train.convert.shards import Entry, Shard, ShardWriter, plan_shards, write_index
from train.inference.special import special_id

TORCH_DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEMPLATE = "chat_template.jinja"


def resolve_export_dtype(name: Literal["auto"] | DType, reader: CheckpointReader) -> DType:
    """The dtype to write; auto is what was imported, or what the run computed with: bf16 loses nothing that a forward pass
    has seen."""
    if name != "auto":
        return name
    settings = reader.settings
    if isinstance(settings, ImportedConfig):
        return settings.origin.dtype
    return "fp32" if settings.compute_precision == "fp32" else "bf16"


def plan_weights(reader: CheckpointReader, dtype: DType, *, shard_bytes: int) -> tuple[Shard, ...]:
    """The weight files. Raises UserError when the checkpoint's tensors are not those of its configuration."""
    keymap = KeyMap(reader.model)
    keymap.check_logical({name: reader.shape(name) for name in reader.names})
    entries = {name: Entry(shape=shape, dtype=TORCH_DTYPES[dtype]) for name, shape in keymap.foreign_shapes.items()}
    return plan_shards(entries, shard_bytes=shard_bytes)


def write_model(reader: CheckpointReader, plan: tuple[Shard, ...], folder: Path, *, dtype: DType) -> None:
    """Fill `folder` with all that `from_pretrained` reads. Holds one fp32 tensor at a time.

    Raises UserError when the family cannot hold the model, or the checkpoint is not one of its configuration.
    """
    model = reader.model
    check_expressible(model)
    tokenizer = Tokenizer(reader.tokenizer_folder)
    if tokenizer.text_size > model.vocab_size:
        raise UserError(
            f"{reader.tokenizer_folder}: has {tokenizer.text_size} tokens, model.vocab_size={model.vocab_size}; "
            "it is not the tokenizer that the model was trained with"
        )
    write_weights(reader, plan, folder, dtype=dtype)
    special = SpecialIds(
        bos=special_id(tokenizer, "bos_token"), eos=special_id(tokenizer, "eos_token"), pad=padding_id(tokenizer, model)
    )
    _write_json(folder / "config.json", model_config(model, special, dtype))
    copy_tokenizer(reader.tokenizer_folder, folder)
    if not model.labels and not (folder / GENERATION_FILE).is_file():  # that of an imported model comes with its tokenizer
        _write_json(folder / GENERATION_FILE, generation_config(special))


def padding_id(tokenizer: Tokenizer, model: ModelConfig) -> int | None:
    """The id that rows of a model with labels may be filled up with; None where no token is safe.

    transformers takes the label from the last token that is not this one. The end token is none, though many tokenizers pad
    with it: a row that ends in it would be read one token early, alone as well, without a word. Without an id transformers
    reads one row at a time, at its last token, and refuses several together.
    """
    pad = special_id(tokenizer, "pad_token")
    if pad is None or pad == special_id(tokenizer, "eos_token") or pad >= model.vocab_size:
        return None
    return pad


def write_weights(reader: CheckpointReader, plan: tuple[Shard, ...], folder: Path, *, dtype: DType) -> None:
    """Write the weight files, and their index when there are several.

    Raises UserError for a value that is not finite, or that `dtype` cannot hold.
    """
    keymap = KeyMap(reader.model)
    sizes = {name: entry.bytes for shard in plan for name, entry in shard.entries.items()}
    with (
        ShardWriter(folder, plan) as writer,
        tqdm(total=sum(sizes.values()), desc="weights", unit="B", unit_scale=True, disable=None) as bar,
    ):
        for name in keymap.logical_shapes:
            keys = keymap.foreign_names(name)
            if any(writer.wants(key) for key in keys):
                whole = _narrowed(name, reader.read(name), dtype)
                for key, part in keymap.to_foreign(name, whole).items():
                    writer.write(key, part)
            bar.update(sum(sizes[key] for key in keys))
    write_index(folder, plan)


def _narrowed(name: str, whole: Tensor, dtype: DType) -> Tensor:
    if not torch.isfinite(whole).all():
        raise UserError(f"{name}: holds values that are not finite; export an earlier checkpoint")
    narrow = whole.to(TORCH_DTYPES[dtype])
    if not torch.isfinite(narrow).all():
        raise UserError(f"{name}: holds values up to {whole.abs().max():.3g}, which {dtype} cannot; give dtype=bf16 or fp32")
    return narrow


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files as they are; our own table of byte counts is no part of the format.

    A chat template that only the settings hold is written as a file as well, where newer readers look for it.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".npy":
            if (folder / path.name).exists():
                raise UserError(f"{path}: a tokenizer's file with the name of one of the model's; remove it")
            shutil.copyfile(path, folder / path.name)
    settings = folder / "tokenizer_config.json"
    template = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(template, str) and not (folder / TEMPLATE).exists():
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
