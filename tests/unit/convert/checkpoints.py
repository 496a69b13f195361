"""Small checkpoints on disk, in the format that the store writes, without an engine; and held-out text without a corpus."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from conf.compose import write_config
from data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from data_pipeline.facts import inspect_sources
from data_pipeline.loader import IGNORE, MicroBatch
from data_pipeline.tokenizer import train_tokenizer
from train.checkpoint.manifest import Manifest, StoredFragment, StoredTensor, file_facts, folder_of
from train.checkpoint.reader import CheckpointReader
from train.config.model import ModelConfig, RopeConfig
from train.config.pretrain import PretrainConfig
from train.config.training import BudgetConfig, Precision, RunConfig
from train.model.cost import parameter_shapes
from train.model.init import keyed_seed

VOCAB_SIZE = 290  # of 320 rows
LENGTH = 64

GPT2 = ModelConfig(
    family="gpt2",
    num_layers=2,
    hidden_size=48,
    num_heads=3,
    ffn_size=112,
    max_positions=160,
    vocab_size=VOCAB_SIZE,
    positions="learned",
    norm="layer",
    mlp="gelu",
    bias=True,
    tied_head=True,
)
LLAMA = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=96,
    max_positions=160,
    vocab_size=VOCAB_SIZE,
    positions="rotary",
    rope=RopeConfig(base=5000.0),
    norm="rms",
    mlp="swiglu",
    bias=False,
    tied_head=False,
)
LLAMA_STRETCHED = replace(
    LLAMA, tied_head=True, bias=True, rope=RopeConfig(base=5000.0, scaling="llama3", factor=4.0, original_max_positions=64)
)


def write_checkpoint(
    run_folder: Path, model: ModelConfig, *, precision: Precision = "fp32", corpus: Path | None = None
) -> Path:
    """A checkpoint of random weights, norms and biases included.

    Its tokenizer is that of `corpus`; without one it is trained on a few words, and the run's corpus is gone.
    """
    data = DataConfig(sources=(SourceConfig(path=str(corpus or run_folder / "no-corpus")),), sequence_length=LENGTH)
    config = PretrainConfig(
        run=RunConfig(name="sample"),
        model=model,
        data=data,
        budget=BudgetConfig(steps=10),
        precision=precision,
    )
    folder = folder_of(run_folder / "checkpoints", 7)
    folder.mkdir(parents=True)
    tensors, index = {}, {}
    for name, shape in parameter_shapes(model).items():
        generator = torch.Generator().manual_seed(keyed_seed("checkpoint", name))
        centre = 1.0 if "norm.weight" in name and not model.norm_one_plus else 0.0
        tensors[f"weight/{name}"] = torch.empty(shape).normal_(centre, 0.1, generator=generator).flatten()
        piece = StoredFragment(file="rank-00000.safetensors", start=0, length=tensors[f"weight/{name}"].numel())
        index[name] = StoredTensor(shape=shape, fragments=(piece,))
    save_file(tensors, folder / "rank-00000.safetensors", metadata={"format": "pt"})
    write_config(config, folder / "config.yaml")
    (folder / "state.json").write_text("{}")
    if corpus is None:
        words = ["def main(argv): return the text of nothing, then again"]
        train_tokenizer(TokenizerConfig(vocab_size=280, min_frequency=1), words, folder / "tokenizer")
    else:
        shutil.copytree(inspect_sources(data).tokenizer_path, folder / "tokenizer")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = Manifest(
        step=7,
        tokens=7 * 256 * LENGTH,
        layout={"world_size": 1, "zero": 1},
        data_fingerprint="none" if corpus is None else inspect_sources(data).fingerprint,
        files={path.relative_to(folder).as_posix(): file_facts(path) for path in files},
        tensors=index,
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def open_checkpoint(run_folder: Path, model: ModelConfig, *, precision: Precision = "fp32") -> CheckpointReader:
    """The same, opened."""
    return CheckpointReader(write_checkpoint(run_folder, model, precision=precision))


class HeldOut:
    """Stands in for the loader of held-out text: random ids in random documents."""

    sequence_length = LENGTH

    def __init__(self, *, document_mask: bool, num_samples: int = 3) -> None:
        self.document_mask = document_mask
        self.num_samples = num_samples

    def micro_batch(self, sample_ids: list[int]) -> MicroBatch:
        """One sample of three documents, or of one run of text."""
        (number,) = sample_ids
        generator = torch.Generator().manual_seed(number)
        tokens_T = torch.randint(VOCAB_SIZE, (LENGTH,), generator=generator)
        labels_T = torch.cat([tokens_T[1:], torch.tensor([IGNORE])])
        bounds = [0, 20 + number, 41, LENGTH] if self.document_mask else [0, LENGTH]
        for end in bounds[1:]:
            labels_T[end - 1] = IGNORE
        positions_T = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(bounds)])
        return MicroBatch(
            tokens=tokens_T,
            labels=labels_T,
            positions=positions_T,
            document_bounds=torch.tensor([*bounds, LENGTH, LENGTH], dtype=torch.int32),
            sample_ids=(number,),
            target_tokens=int((labels_T != IGNORE).sum()),
            target_bytes=0,
            data_hash=0,
        )


def rewritten(folder: Path, **changes: object) -> None:
    """The manifest of `folder` with other values, as somebody would write it who knows the format: without a seal."""
    raw = json.loads((folder / "manifest.json").read_text())
    raw.pop("seal")
    (folder / "manifest.json").write_text(json.dumps({**raw, "version": 1, **changes}))
