"""Checks that run no model: the folder's weights, settings and tokenizer against the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from math import isclose
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conf.errors import UserError
from data_pipeline.tokenizer import TOKENIZER_FILE, Tokenizer
from train.checkpoint.reader import CheckpointReader
from train.config.model import ModelConfig
from train.convert.families.rope import WORDS
from train.convert.hf_import import name_tensors
from train.convert.keymap import KeyMap
from train.convert.proof.finding import Figures, Finding
from train.convert.proof.stored import read_logical
from train.convert.weights import WeightFiles, WeightFormat

SAMPLE_TEXT = (
    "def main(argv):\n    return 0  # naïve — 日本語 😀\n\n\tif x!=1.5e-3: print('don\\'t')\n"
    "HELLO'LL WE'VE 1234567 3.14159 2026-11   three  blanks \u00a0 Ünïcode مرحبا мир\r\n <tag/> e\u0301\n\n\n"
)
NOT_IN_A_FOLDER = ("dropout", "init_std", "z_loss", "vocab_multiple", "mup_base_width")
"""Settings of training, and of our layout, of which config.json says nothing that must be kept."""


def prove_weights(
    reader: CheckpointReader, folder: Path, *, rounding: torch.dtype | None, format: WeightFormat = "safetensors"
) -> Finding:
    """The folder's weights, mapped to ours, are the checkpoint's to the bit; all are finite; no key is missing or unknown.

    `rounding` is the dtype of the folder, to which the checkpoint's are rounded; None: both hold the same values.
    """
    model = reader.model
    keymap = KeyMap(model)
    try:
        files = WeightFiles(folder, format)
        place = name_tensors(files, model)
        keymap.check_foreign({name: files.entries[there].shape for name, there in place.items()})
    except UserError as error:
        return Finding(name="weights", problems=(str(error),))
    different, not_finite, misread = [], [], []
    for name in tqdm(keymap.logical_shapes, desc="weights mapped back", unit="tensor", disable=None):
        dtype = torch.float32 if rounding is None else rounding
        back = keymap.to_logical(name, lambda key: files.read_unchecked(place[key]))
        misread += [name] if rounding is not None and back.dtype != rounding else []
        expected = read_logical(reader, name, rounding=rounding, dtype=dtype)
        if name in ("embedding.tokens.weight", "head.weight"):  # padding rows are cut
            back, expected = (tensor[: model.vocab_size] for tensor in (back, expected))
        not_finite += [] if _is_finite(back) and _is_finite(expected) else [name]
        different += [] if torch.equal(back.to(dtype), expected) else [name]
    texts = {
        f"are not stored as {rounding}": misread,
        "hold values that are not finite": not_finite,
        "differ from the checkpoint's": different,
    }
    problems = tuple(f"{len(names)} tensors {text}: {names[:5]}" for text, names in texts.items() if names)
    figures: Figures = {"tensors": len(place), "bit_equal": not different}
    return Finding(name="weights", figures=figures, problems=problems)


def _is_finite(values: Tensor) -> bool:
    # Extremes in place of `isfinite` of all: no second tensor as large.
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def prove_config(model: ModelConfig, folder: Path, read_back: Callable[[Path], ModelConfig]) -> Finding:
    """The settings that `read_back` reads from the folder's config.json are the checkpoint's, field by field."""
    try:
        found = read_back(folder)
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        return Finding(name="config", problems=(f"config.json cannot be read back: {error}",))
    ours, theirs = _computed(model), _computed(found)
    problems = tuple(
        f"{name}: the checkpoint's is {ours.get(name)}, config.json says {theirs.get(name)}"
        for name in dict.fromkeys([*ours, *theirs])
        if not _same(ours.get(name), theirs.get(name))
    )
    return Finding(name="config", figures={"fields": len(ours)}, problems=problems)


def _computed(model: ModelConfig) -> dict[str, Any]:
    """All settings that a computation follows from, in one form: nulls filled in, what nothing reads left out."""
    windows = [model.window_of(number) for number in range(model.num_layers)]
    apart = ("rope", "local_rope", "window", "window_pattern", *NOT_IN_A_FOLDER)
    values = {field.name: getattr(model, field.name) for field in fields(ModelConfig) if field.name not in apart}
    values |= {
        "num_kv_heads": model.kv_heads,
        "head_size": model.head_dim,
        "qkv_bias": model.has_qkv_bias,
        "attention_output_bias": model.has_attention_output_bias,
        "attention_scale": model.score_scale,
        # A window as long as the context is none.
        "windows": tuple(None if window is None or window >= model.max_positions else window for window in windows),
    }
    for window in dict.fromkeys(windows):
        rope = model.rope_of(window)
        if rope is not None:
            name = "rope" if rope == model.rope else "local_rope"
            read = ("base", "fraction", "scaling", *WORDS[rope.scaling].values())
            values |= {f"{name}.{field}": getattr(rope, field) for field in read if field not in ("factor", "attention_factor")}
            values[f"{name}.amplitude"] = rope.amplitude
            if rope.scaling not in ("none", "longrope"):
                values[f"{name}.factor"] = rope.factor
    return values


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return isclose(one, other, rel_tol=1e-6)
    return one == other


def prove_tokenizer(source: Path, folder: Path) -> Finding:
    """The folder's tokenizer, as transformers reads it, gives the ids that training saw."""
    expected = Tokenizer(source).encode(SAMPLE_TEXT)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Finding(name="tokenizer", problems=(f"transformers cannot read it: {error}",))
    found = tokenizer(SAMPLE_TEXT, add_special_tokens=False).input_ids
    figures: Figures = {"tokens": len(expected)}
    problems: tuple[str, ...] = ()
    if found != expected:
        if (folder / TOKENIZER_FILE).is_file() and Tokenizer(folder).encode(SAMPLE_TEXT) == expected:
            figures["note"] = (
                f"{type(tokenizer).__name__} of this transformers reads {TOKENIZER_FILE} otherwise than it says; "
                f"PreTrainedTokenizerFast.from_pretrained reads it as training did"
            )
            if _plain_ids(folder) == expected:
                return Finding(name="tokenizer", figures=figures)
        problems = (f"a sample text becomes {found[:20]}, expected {expected[:20]}",)
    return Finding(name="tokenizer", figures=figures, problems=problems)


def _plain_ids(folder: Path) -> list[int]:
    plain = PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER_FILE))
    return plain(SAMPLE_TEXT, add_special_tokens=False).input_ids
