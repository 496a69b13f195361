"""A Hugging Face folder as a model: the weights of the checkpoint that was exported; and folders that hold none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from tests.unit.convert.checkpoints import GPT2, LLAMA, LLAMA_STRETCHED, write_checkpoint
from train.checkpoint.reader import CheckpointReader
from train.convert.hf_export import plan_weights, write_model
from train.convert.hf_reader import HuggingFaceReader
from train.evaluate.subject import open_subject
from train.inference.load import load_decoder


def exported(folder: Path, model=LLAMA) -> tuple[CheckpointReader, Path]:
    reader = CheckpointReader(write_checkpoint(folder / "run", model))
    out = folder / "hf"
    out.mkdir()
    write_model(reader, plan_weights(reader, "fp32", shard_bytes=50_000), out, dtype="fp32")
    return reader, out


@pytest.mark.parametrize("model", [GPT2, LLAMA, LLAMA_STRETCHED], ids=["gpt2", "llama", "stretched"])
def test_the_weights_are_the_checkpoints(tmp_path: Path, model) -> None:
    checkpoint, out = exported(tmp_path, model)
    reader = HuggingFaceReader(out)
    assert set(reader.names) == set(checkpoint.names)
    rows = checkpoint.model.vocab_size
    for name in reader.names:
        ours, theirs = checkpoint.read(name), reader.read(name)
        cut = slice(rows) if name in ("embedding.tokens.weight", "head.weight") else slice(None)  # the padding is not exported
        assert theirs.dtype == torch.float32 and torch.equal(ours[cut], theirs[cut]), name
    decoder = load_decoder(reader, torch.float32, device=torch.device("cpu"))
    assert sum(parameter.numel() for parameter in decoder.parameters()) > 0
    assert reader.tokenizer_folder == out


def test_the_hash_is_of_settings_and_weights(tmp_path: Path) -> None:
    _, out = exported(tmp_path)
    before = HuggingFaceReader(out).hash
    (out / "README.md").write_text("a card")
    assert HuggingFaceReader(out).hash == before
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"rope_theta": 9.0}))
    other = HuggingFaceReader(out).hash
    weights = sorted(out.glob("*.safetensors"))[0]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert len({before, other, HuggingFaceReader(out).hash}) == 3


def test_what_is_known_of_it_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, out = exported(tmp_path)
    subject = open_subject(None, str(out), verify=True)
    ours = open_subject(str(checkpoint.path), None, verify=True)
    for name in ("parameters", "tokenizer", "family"):
        assert subject.identity[name] == ours.identity[name]
    assert subject.label == "hf" and ours.label == "step-00000007" and ours.identity["run"] == "sample"
    assert subject.run is None and subject.own_sources() == () and [one.label for one in ours.own_sources()] == ["no-corpus"]
    assert ours.folder == tmp_path / "run" and subject.folder == Path()
    assert (subject.opening, subject.end_of_document, subject.first) == ((), 0, (0,))
    monkeypatch.chdir(out)
    assert open_subject(None, ".", verify=True).label == "hf"


def test_a_checkpoint_that_was_changed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "run", LLAMA)
    weights = folder / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert open_subject(str(tmp_path / "run"), None, verify=False).label == "step-00000007"
    with pytest.raises(UserError, match=r"rank-00000.safetensors: .*SHA-256"):
        open_subject(str(tmp_path / "run"), None, verify=True)


class TestFoldersThatAreNoModel:
    def refused(self, folder: Path, expected: str) -> None:
        with pytest.raises(UserError, match=expected):
            open_subject(None, str(folder), verify=True)

    def test_nothing_in_it(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "config.json")

    def test_a_checkpoint(self, tmp_path: Path) -> None:
        self.refused(write_checkpoint(tmp_path / "run", LLAMA), "config.json")

    def test_another_kind_of_model(self, tmp_path: Path) -> None:
        _, out = exported(tmp_path)
        (out / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
        self.refused(out, "bert")
        (out / "config.json").write_text("{")
        self.refused(out, "config.json")

    def test_without_weights(self, tmp_path: Path) -> None:
        _, out = exported(tmp_path)
        for path in out.glob("*.safetensors*"):
            path.unlink()
        self.refused(out, "safetensors")

    def test_a_weight_file_that_is_missing_or_cut(self, tmp_path: Path) -> None:
        _, out = exported(tmp_path)
        first, second = sorted(out.glob("*.safetensors"))[:2]
        first.write_bytes(first.read_bytes()[:500])
        self.refused(out, first.name)
        second.unlink()
        self.refused(out, f"{first.name}|{second.name}")

    def test_without_a_tokenizer(self, tmp_path: Path) -> None:
        _, out = exported(tmp_path)
        (out / "tokenizer.json").unlink()
        self.refused(out, "holds no tokenizer.json; give the folder of a Hugging Face tokenizer")

    def test_a_checkpoint_without_its_tokenizer(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "run", LLAMA)
        shutil.rmtree(folder / "tokenizer")
        with pytest.raises(UserError, match="tokenizer"):
            open_subject(str(folder), None, verify=True)
        with pytest.raises(UserError, match="tokenizer"):
            open_subject(str(folder), None, verify=False)
