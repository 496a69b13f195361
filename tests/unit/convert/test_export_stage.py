"""`longhaul export` from a checkpoint on disk: the folder, the report, the proof in its own process, and what goes wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.compose import compose, validate
from conf.errors import ConfigError, UserError
from tests.unit.convert.checkpoints import GPT2, LLAMA, rewritten, write_checkpoint
from train.checkpoint.manifest import file_facts
from train.checkpoint.reader import CheckpointReader
from train.config.export import ExportConfig
from train.convert.prove import Task, find_held_out
from train.convert.publication import REPORT
from train.stages.export import run


def _config(tmp_path, **settings):
    return ExportConfig(**({"checkpoint": str(tmp_path / "run"), "out": str(tmp_path / "hf")} | settings))


@pytest.mark.further
def test_export_with_its_proof(tmp_path, corpus, capsys):
    model = replace(LLAMA, vocab_size=300)
    checkpoint = write_checkpoint(tmp_path / "run", model, precision="bf16", corpus=corpus)
    assert run(_config(tmp_path, shard_bytes=100_000)) == 0
    out = tmp_path / "hf"
    report = json.loads((out / REPORT).read_text())
    assert report["proved"]
    assert (report["step"], report["dtype"], report["origin"]) == (7, "bf16", "sample")
    assert report["proof"]["logits"]["argmax_equal"] >= 1000
    loss = report["proof"]["held_out_loss"]
    assert loss["targets"] > 0
    assert abs(loss["longhaul"] - loss["transformers"]) == loss["difference"] < 1e-5
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"} <= names
    for path in (checkpoint / "tokenizer").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    shown = capsys.readouterr().out
    assert f"{loss['transformers']:.6f} in transformers, over {loss['targets']:,} held-out tokens" in shown
    card = (out / "README.md").read_text()
    assert "# sample" in card
    assert str(tmp_path) not in card  # no path of this machine
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == AutoTokenizer.from_pretrained(out).eos_token_id == 0


def test_a_custom_model_is_refused_before_anything_is_read(tmp_path):
    (write_checkpoint(tmp_path / "run", replace(LLAMA, family="custom", window=8)) / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.family=custom: no Hugging Face class is named for this model"):
        run(_config(tmp_path))
    assert not (tmp_path / "hf").exists()


def test_held_out_text_that_is_gone_or_another_is_not_measured(tmp_path, corpus):
    gone = CheckpointReader(write_checkpoint(tmp_path / "gone", LLAMA))
    assert "the prepared corpus is gone" in find_held_out(gone).figures["not_measured"]
    folder = write_checkpoint(tmp_path / "run", replace(LLAMA, vocab_size=300), corpus=corpus)
    assert find_held_out(CheckpointReader(folder)).num_samples > 0
    rewritten(folder, data_fingerprint="another")
    assert "is not the one" in find_held_out(CheckpointReader(folder)).figures["not_measured"]


@pytest.mark.further
def test_a_failed_proof_publishes_nothing(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "run", LLAMA)
    # The child holds the folder against a checkpoint that differs in the rotary base alone.
    other = write_checkpoint(tmp_path / "other", replace(LLAMA, rope=replace(LLAMA.rope, base=900.0)))
    monkeypatch.setattr("train.stages.export.Task", lambda **settings: Task(**(settings | {"checkpoint": other})))
    with pytest.raises(UserError, match="logits: logits differ"):
        run(_config(tmp_path))
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "hf.partial").exists()
    assert checkpoint.exists()


def test_a_proof_that_dies_publishes_nothing(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "run", LLAMA)
    monkeypatch.setattr("train.convert.prove.sys.executable", "/bin/false")
    with pytest.raises(UserError, match="exit code 1 before it was done"):
        run(_config(tmp_path))
    assert not (tmp_path / "hf").exists()


def test_without_a_folder_the_run_and_the_step_name_it(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "run", GPT2)
    monkeypatch.chdir(tmp_path)
    run(_config(tmp_path, proof=False, out=None))
    assert (tmp_path / "exported" / "sample-step-00000007" / "config.json").is_file()


def test_without_a_proof_the_report_says_so(tmp_path, capsys):
    write_checkpoint(tmp_path / "run", GPT2)
    run(_config(tmp_path, proof=False))
    report = json.loads((tmp_path / "hf" / REPORT).read_text())
    assert (report["proved"], report["proof"], report["dtype"]) == (False, {}, "fp32")
    assert "not proved" in capsys.readouterr().out
    assert "There is none: no proof was asked for (proof=false)" in (tmp_path / "hf" / "README.md").read_text()


def test_transformers_missing_is_told_before_anything_is_written(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "run", GPT2)
    monkeypatch.setattr("train.convert.prove.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs transformers"):
        run(_config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def _rewrite(checkpoint, change):
    """Change the stored tensors, and the manifest so that the file is believed."""
    path = checkpoint / "rank-00000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][path.name] = vars(file_facts(path))
    rewritten(checkpoint, **{key: value for key, value in manifest.items() if key not in ("seal", "version")})


def test_damage_and_divergence_are_told(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run", LLAMA)
    _rewrite(checkpoint, lambda tensors: tensors["weight/final_norm.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match="final_norm.weight: holds values that are not finite"):
        run(_config(tmp_path))
    (checkpoint / "state.json").write_text("{ }")
    with pytest.raises(UserError, match="state.json"):
        run(_config(tmp_path))
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_that_is_not_its_configurations(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run", LLAMA)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["tensors"]["extra.weight"] = manifest["tensors"].pop("final_norm.weight")
    rewritten(checkpoint, **{key: value for key, value in manifest.items() if key not in ("seal", "version")})
    with pytest.raises(UserError, match="holds unknown extra.weight; lacks final_norm.weight"):
        run(_config(tmp_path))


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
    write_checkpoint(tmp_path / "run", replace(LLAMA, vocab_size=270))
    with pytest.raises(UserError, match="has 280 tokens, model.vocab_size=270"):
        run(_config(tmp_path))


def test_a_file_of_the_tokenizer_never_replaces_one_of_the_models(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run", LLAMA)
    (checkpoint / "tokenizer" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="with the name of one of the model's"):
        run(_config(tmp_path))


def test_every_problem_of_the_settings_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        ExportConfig(checkpoint="", out="..", shard_bytes=0, proof_sequences=0)
    assert len(caught.value.problems) == 4


def test_the_command_lines_words():
    config = validate(ExportConfig, compose("export", ["checkpoint=runs/first", "out=exported/first", "dtype=fp32"]))
    assert (config.format, config.dtype, config.proof) == ("hf", "fp32", True)
