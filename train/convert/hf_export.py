"""A checkpoint as a Hugging Face model folder: weights tensor by tensor, settings, tokenizer. Needs no GPU and no group."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from conf.errors import UserError
from data_pipeline.tokenizer import Tokenizer
from train.checkpoint.reader import CheckpointReader
from train.config.pretrain import PretrainConfig
from train.convert.hf_config import SpecialIds, check_expressible, generation_config, model_config
from train.convert.keymap import KeyMap
from train.convert.shards import ShardWriter, plan_shards
from train.inference.special import special_id

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_export_dtype(name: Literal["auto", "fp32", "bf16"], config: PretrainConfig) -> Literal["fp32", "bf16"]:
    """The dtype to write; auto is what the run computed with: bf16 loses nothing that a forward pass has seen."""
    if name != "auto":
        return name
    return "fp32" if config.precision == "fp32" else "bf16"


def write_model(reader: CheckpointReader, folder: Path, *, dtype: Literal["fp32", "bf16"], shard_bytes: int) -> None:
    """Fill `folder` with all that `from_pretrained` reads. Holds one fp32 tensor at a time.

    Raises UserError when the family cannot hold the model, or the checkpoint is not one of its configuration.
    """
    config = reader.config
    check_expressible(config.model)
    tokenizer = Tokenizer(reader.tokenizer_folder)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{reader.tokenizer_folder}: has {tokenizer.vocab_size} tokens, model.vocab_size={config.model.vocab_size}; "
            "it is not the tokenizer that the model was trained with"
        )
    write_weights(reader, folder, dtype=dtype, shard_bytes=shard_bytes)
    special = SpecialIds(bos=special_id(tokenizer, "bos_token"), eos=special_id(tokenizer, "eos_token"))
    _write_json(folder / "config.json", model_config(config.model, special, dtype))
    _write_json(folder / "generation_config.json", generation_config(special))
    copy_tokenizer(reader.tokenizer_folder, folder)


def write_weights(reader: CheckpointReader, folder: Path, *, dtype: Literal["fp32", "bf16"], shard_bytes: int) -> None:
    """Write the weight files, and their index when there are several."""
    keymap = KeyMap(reader.config.model)
    keymap.check_logical({name: reader.shape(name) for name in reader.names})
    torch_dtype = TORCH_DTYPES[dtype]
    plan = plan_shards(keymap.foreign_shapes, torch_dtype, shard_bytes=shard_bytes)
    with ShardWriter(folder, plan, torch_dtype) as writer:
        for name in tqdm(keymap.logical_shapes, desc="weights", unit="tensor", disable=None):
            whole = reader.read(name)
            if not torch.isfinite(whole).all():
                raise UserError(f"{name}: holds values that are not finite; export an earlier checkpoint")
            for key, part in keymap.to_foreign(name, whole).items():
                writer.write(key, part)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files as they are; our own table of byte counts is no part of the format."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".npy":
            if (folder / path.name).exists():
                raise UserError(f"{path}: a tokenizer's file with the name of one of the model's; remove it")
            shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
