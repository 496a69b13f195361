"""The proof of an export passes for a faithful one, and catches every fault that is put into one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.pairs import CASES as PARITY_CASES
from tests.unit.convert.checkpoints import GPT2, LLAMA, LLAMA_STRETCHED, VOCAB_SIZE, HeldOut, open_checkpoint
from train.convert import keymap as keymap_module
from train.convert import proof
from train.convert.hf_export import TORCH_DTYPES, write_model
from train.convert.keymap import LLAMA as LLAMA_TABLE
from train.convert.proof import LOGITS_TOLERANCE, _parted_at_a_tie, load_ours, load_theirs, prove, prove_generation

CASES = {"gpt2": GPT2, "llama": LLAMA, "llama-stretched-biases": LLAMA_STRETCHED}
FAMILIES = {
    name: replace(model, vocab_size=VOCAB_SIZE)
    for name, model in PARITY_CASES.items()
    if model.family not in ("gpt2", "llama") and name not in ("qwen2-tied-linear", "stablelm-qkv-bias")
}


def _export(tmp_path, model, dtype="fp32"):
    reader = open_checkpoint(tmp_path / "run", model)
    folder = tmp_path / "exported"
    folder.mkdir()
    write_model(reader, folder, dtype=dtype, shard_bytes=100_000)
    return reader, folder


def _prove(reader, folder, dtype="fp32", *, document_mask=True):
    findings = prove(
        reader,
        folder,
        tokenizer_folder=reader.tokenizer_folder,
        dtype=TORCH_DTYPES[dtype],
        held_out=HeldOut(document_mask=document_mask),
        limit=None,
    )
    return {finding.name: finding for finding in findings}


@pytest.fixture
def few(monkeypatch):
    """A fault needs not a thousand positions to show."""
    monkeypatch.setattr(proof, "MIN_POSITIONS", 100)
    monkeypatch.setattr(proof, "PROMPTS", 1)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_faithful_export_of_every_family_is_proved(tmp_path, few, case):
    findings = _prove(*_export(tmp_path, FAMILIES[case]))
    assert not [problem for finding in findings.values() for problem in finding.problems]
    assert findings.keys() >= {"logits", "generation", "held_out_loss"}
    assert findings["logits"].figures["max_abs_difference"] < LOGITS_TOLERANCE / 2


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "document_mask"), [("fp32", True), ("bf16", False)])
def test_a_faithful_export_is_proved(tmp_path, case, dtype, document_mask):
    findings = _prove(*_export(tmp_path, CASES[case], dtype), dtype, document_mask=document_mask)
    assert {name: finding.problems for name, finding in findings.items()} == dict.fromkeys(
        ["keys", "weights", "tokenizer", "logits", "generation", "held_out_loss"], ()
    )
    logits, loss = findings["logits"].figures, findings["held_out_loss"].figures
    assert logits["max_abs_difference"] < LOGITS_TOLERANCE / 2
    assert logits["argmax_equal"] >= 1000
    assert loss["difference"] < 1e-5
    assert loss["targets"] == sum(HeldOut(document_mask=document_mask).micro_batch([n]).target_tokens for n in range(3))


def _edit_weights(folder, key, change):
    (path,) = [path for path in folder.glob("*.safetensors") if key in load_file(path)]
    tensors = load_file(path)
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def _swap_heads(folder):
    change = lambda weight: weight.view(4, 16, 64)[[1, 0, 2, 3]].reshape(64, 64)  # noqa: E731
    _edit_weights(folder, "model.layers.0.self_attn.q_proj.weight", change)


def _transpose(folder):
    _edit_weights(folder, "model.layers.1.self_attn.o_proj.weight", torch.t)


def _shift_vocabulary(folder):
    _edit_weights(folder, "model.embed_tokens.weight", lambda weight: weight.roll(1, dims=0))


def _round_a_little(folder):
    _edit_weights(folder, "lm_head.weight", lambda weight: weight * (1 + 2e-3))


@pytest.mark.parametrize("fault", [_swap_heads, _transpose, _shift_vocabulary, _round_a_little])
@pytest.mark.usefixtures("few")
def test_a_fault_in_the_weights_is_caught(tmp_path, fault):
    reader, folder = _export(tmp_path, LLAMA)
    fault(folder)
    findings = _prove(reader, folder)
    assert findings["weights"].problems
    assert findings["logits"].problems
    assert findings["held_out_loss"].problems


@pytest.mark.parametrize(
    ("field", "value"), [("rope", 10000.0), ("rms_norm_eps", 1e-2), ("num_key_value_heads", 4), ("hidden_act", "gelu")]
)
@pytest.mark.usefixtures("few")
def test_a_fault_in_the_settings_is_caught(tmp_path, field, value):
    reader, folder = _export(tmp_path, LLAMA)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if field == "rope":
        config["rope_parameters"]["rope_theta"] = config["rope_theta"] = value
    else:
        config[field] = value
    path.write_text(json.dumps(config))
    findings = _prove(reader, folder)
    assert not findings["weights"].problems
    caught = findings["keys"] if field == "num_key_value_heads" else findings["logits"]  # shapes no longer fit
    assert caught.problems


@pytest.mark.usefixtures("few")
def test_a_wrong_key_map_is_caught_though_its_inverse_undoes_it(tmp_path, monkeypatch):
    def swapped(rule):
        return replace(rule, foreign=rule.foreign[::-1]) if "gate_up" in rule.logical else rule

    monkeypatch.setitem(keymap_module.TABLES, "llama", tuple(swapped(rule) for rule in LLAMA_TABLE))
    findings = _prove(*_export(tmp_path, LLAMA))
    assert not findings["weights"].problems
    assert findings["logits"].problems
    assert findings["held_out_loss"].problems


def test_a_missing_and_an_unknown_key_are_caught(tmp_path):
    reader, folder = _export(tmp_path, LLAMA)
    (path,) = [path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path)]
    tensors = load_file(path)
    tensors["model.norm.scale"] = tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    index_path = folder / "model.safetensors.index.json"
    index_path.write_text(index_path.read_text().replace("model.norm.weight", "model.norm.scale"))
    findings = _prove(reader, folder)
    assert any("missing_keys" in text for text in findings["keys"].problems)
    assert any("unexpected_keys" in text for text in findings["keys"].problems)
    assert "lacks model.norm.weight" in findings["weights"].problems[0]
    assert "logits" not in findings


@pytest.mark.usefixtures("few")
def test_another_tokenizer_is_caught(tmp_path):
    reader, folder = _export(tmp_path, LLAMA)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-20]
    path.write_text(json.dumps(content))
    assert _prove(reader, folder)["tokenizer"].problems


def test_continuations_may_part_at_a_tie_alone(tmp_path):
    ours = load_ours(open_checkpoint(tmp_path / "run", LLAMA), torch.float32)
    assert not _parted_at_a_tie(ours, [5, 6, 7], [5, 6, 8])
    assert not _parted_at_a_tie(ours, [5, 6], [5, 6, 8])  # one is shorter: no tie explains that
    ours.layers[-1].output.weight.fill_(1.0)
    assert _parted_at_a_tie(ours, [5, 6, 7], [5, 6, 8])


@pytest.mark.usefixtures("few")
def test_another_continuation_is_caught(tmp_path):
    reader, folder = _export(tmp_path, LLAMA)
    theirs, _ = load_theirs(folder)
    ours = load_ours(reader, torch.float32)
    assert not prove_generation(ours, theirs, LLAMA).problems
    with torch.no_grad():
        theirs.lm_head.weight.neg_()
    assert prove_generation(ours, theirs, LLAMA).problems


def test_a_folder_that_transformers_cannot_read(tmp_path):
    _, folder = _export(tmp_path, LLAMA)
    (folder / "config.json").unlink()
    theirs, finding = load_theirs(folder)
    assert theirs is None
    assert "cannot read the folder" in finding.problems[0]
