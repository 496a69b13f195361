"""Every family, there and back: a model of Hugging Face is imported, computes and trains as there, and is exported again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tests.parity.foreign import CASES, MAX_POSITIONS, VOCAB_SIZE, build, save
from train.checkpoint.reader import CheckpointReader
from train.config.export import ExportConfig
from train.config.hf_import import ImportConfig
from train.convert.hf_config import read_model_config
from train.convert.proof import outputs
from train.convert.proof.checks import Subject, prove
from train.convert.prove import find_held_out
from train.inference.load import load_decoder
from train.model.transformer import Reading
from train.stages import export, hf_import

LOGITS_TOLERANCE, STEPS_TOLERANCE = 1e-5, 1e-4
SEQUENCES, LENGTH, STEPS = 2, 150, 5  # beyond position 100, every window, and what stretched ropes were made for
CPU = torch.device("cpu")


def _imported(folder: Path, out: Path, **settings) -> CheckpointReader:
    assert hf_import.run(ImportConfig(hf=str(folder), out=str(out), proof=False, **settings)) == 0
    return CheckpointReader(out)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _batch(step: int) -> tuple:
    """(tokens [T], labels [T], positions [T], bounds) of sequences that are one document each; next-token labels."""
    tokens_BS = torch.randint(VOCAB_SIZE, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(step))
    labels_BS = torch.cat([tokens_BS[:, 1:], torch.full((SEQUENCES, 1), -100)], dim=1)
    positions_T = torch.arange(LENGTH).repeat(SEQUENCES)
    bounds = torch.arange(0, (SEQUENCES + 1) * LENGTH, LENGTH, dtype=torch.int32)
    return tokens_BS.flatten(), labels_BS.flatten(), positions_T, bounds


def _optimizer(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


@pytest.mark.parametrize("case", CASES)
def test_a_model_there_and_back(case, tmp_path):
    theirs = build(case)
    folder = save(theirs, tmp_path / "theirs")
    reader = _imported(folder, tmp_path / "ours")
    reading = Reading(sequence_length=LENGTH, document_mask=False)
    ours = load_decoder(reader, torch.float32, device=CPU, reading=reading).requires_grad_()

    for step in range(STEPS):
        tokens_T, labels_T, positions_T, bounds = _batch(step)
        their_logits_TV = theirs(input_ids=tokens_T.view(SEQUENCES, LENGTH)).logits.flatten(0, 1)
        their_loss = F.cross_entropy(their_logits_TV, labels_T)
        if step == 0:
            our_logits_TV = ours.logits(tokens_T, positions_T, bounds)[:, :VOCAB_SIZE]
            torch.testing.assert_close(our_logits_TV, their_logits_TV, atol=LOGITS_TOLERANCE, rtol=0)
            optimizers = _optimizer(ours), _optimizer(theirs)
        objective, loss, targets = ours(tokens_T, labels_T, positions_T, bounds)
        tolerance = LOGITS_TOLERANCE if step == 0 else STEPS_TOLERANCE
        torch.testing.assert_close(loss / targets, their_loss.detach(), atol=tolerance, rtol=0)
        for optimizer, objective_mean in zip(optimizers, (objective / targets, their_loss), strict=True):
            optimizer.zero_grad()
            objective_mean.backward()
            optimizer.step()

    assert export.run(ExportConfig(checkpoint=str(reader.path), out=str(tmp_path / "back"), proof=False)) == 0
    before, after = _weights(folder), _weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


PROVED = (
    "gpt2", "gpt-neox", "llama-yarn", "qwen2-window-yarn", "gemma", "gemma3", "phi3-longrope-partial", "olmo2", "stablelm",
)  # fmt: skip


@pytest.mark.parametrize("case", PROVED)
def test_an_import_is_proved_against_the_folder(case, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "MIN_POSITIONS", 100)
    folder = save(build(case), tmp_path / "theirs", dtype=torch.float16 if case == "gpt-neox" else torch.float32)
    _proved(_imported(folder, tmp_path / "ours"), folder, "safetensors")


def test_files_as_gpt2_was_published_are_proved(tmp_path, monkeypatch):
    """Names without a prefix, masks among the weights, and all of it pickled."""
    monkeypatch.setattr(outputs, "MIN_POSITIONS", 100)
    folder = save(build("gpt2"), tmp_path / "theirs")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in _weights(folder).items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, MAX_POSITIONS, MAX_POSITIONS, dtype=torch.bool).tril()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    _proved(_imported(folder, tmp_path / "pickled", weights="bin"), folder, "bin")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "pytorch_model.bin").unlink()
    _proved(_imported(folder, tmp_path / "ours"), folder, "safetensors")


def _proved(reader: CheckpointReader, folder: Path, weights: str) -> None:
    findings = prove(
        reader,
        Subject(folder=folder, tokenizer=folder, weights=weights),
        rounding=None,
        held_out=find_held_out(reader),
        limit=None,
        read_back=lambda path: read_model_config(path).model,
    )
    assert {finding.name: finding.problems for finding in findings} == dict.fromkeys(
        ["keys", "weights", "config", "tokenizer", "logits", "generation", "perplexity", "held_out_loss"], ()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_to_the_bit(dtype, tmp_path):
    folder = save(build("llama"), tmp_path / "theirs", dtype=dtype)
    reader = _imported(folder, tmp_path / "ours", shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    settings = ExportConfig(checkpoint=str(reader.path), out=str(tmp_path / "back"), proof=False, shard_bytes=30_000)
    assert export.run(settings) == 0
    before, after = _weights(folder), _weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(tensor.dtype == dtype and torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_the_proof_reads_long_and_short_documents_apart(tmp_path, monkeypatch):
    """transformers takes the frequencies of a batch's longest row for all its rows; here a row has those of its length."""
    monkeypatch.setattr(outputs, "MAX_LENGTH", 40)
    folder = save(build("phi3-longrope-partial"), tmp_path / "theirs")  # the first lengths end at 64
    _proved(_imported(folder, tmp_path / "ours"), folder, "safetensors")
