"""The proof of an export passes for a faithful one, and catches every fault that is put into one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.errors import UserError
from tests.parity.pairs import CASES as PARITY_CASES
from tests.unit.convert.checkpoints import GPT2, LLAMA, LLAMA_STRETCHED, VOCAB_SIZE, HeldOut, open_checkpoint
from train.convert.families import FAMILIES as FOREIGN
from train.convert.hf_config import read_model_config
from train.convert.hf_export import plan_weights, write_model
from train.convert.keymap import rules_of
from train.convert.proof import outputs, rows, stored
from train.convert.proof.checks import Subject, prove
from train.convert.proof.files import prove_config
from train.convert.proof.finding import LOGITS_TOLERANCE, Finding
from train.convert.proof.ours import OurModel
from train.convert.proof.outputs import prove_generation, sequence_length
from train.convert.proof.theirs import open_theirs
from train.convert.prove import ROUNDINGS

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
    write_model(reader, plan_weights(reader, dtype, shard_bytes=100_000), folder, dtype=dtype)
    return reader, folder


def _prove(reader, folder, dtype="fp32", *, document_mask=True):
    findings = prove(
        reader,
        Subject(folder=folder, tokenizer=folder),
        rounding=ROUNDINGS[dtype],
        held_out=HeldOut(document_mask=document_mask),
        limit=None,
        read_back=lambda path: read_model_config(path).model,
    )
    return {finding.name: finding for finding in findings}


@pytest.fixture
def few(monkeypatch):
    """A fault needs not a thousand positions to show."""
    monkeypatch.setattr(outputs, "MIN_POSITIONS", 100)
    monkeypatch.setattr(outputs, "PROMPTS", 1)


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
        ["keys", "weights", "config", "tokenizer", "logits", "generation", "perplexity", "held_out_loss"], ()
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


@pytest.mark.parametrize(
    ("fault", "tensor", "place"),
    [
        (_swap_heads, "blocks.0.attention.qkv.weight", "after blocks.0"),
        (_transpose, "blocks.1.attention.output.weight", "after blocks.1, at all positions"),
        (_shift_vocabulary, "embedding.tokens.weight", "after embedding, at all positions"),
        (_round_a_little, "head.weight", "in the head: the hidden states before it are equal"),
    ],
)
@pytest.mark.usefixtures("few")
def test_a_fault_in_the_weights_is_caught_and_named(tmp_path, fault, tensor, place):
    reader, folder = _export(tmp_path, LLAMA)
    fault(folder)
    findings = _prove(reader, folder)
    assert findings["weights"].problems == (f"1 tensors differ from the checkpoint's: ['{tensor}']",)
    assert f"the models part {place}" in findings["logits"].problems[0]
    assert findings["perplexity"].problems
    assert findings["held_out_loss"].problems


@pytest.mark.usefixtures("few")
def test_a_weight_that_is_no_number_is_caught_and_named(tmp_path):
    reader, folder = _export(tmp_path, LLAMA)
    _edit_weights(
        folder, "model.layers.1.mlp.down_proj.weight", lambda weight: weight.index_fill(0, torch.tensor(3), torch.nan)
    )
    findings = _prove(reader, folder)
    assert "1 tensors hold values that are not finite: ['blocks.1.mlp.down.weight']" in findings["weights"].problems
    assert "not all finite" in findings["logits"].problems[0]
    assert "after blocks.1" in findings["logits"].problems[0]
    assert findings["generation"].problems or findings["perplexity"].problems


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("rope", 10000.0, "after blocks.0, only from position 1 of a sequence on"),
        ("rms_norm_eps", 1e-2, "after blocks.0, at all positions"),
        ("num_key_value_heads", 4, None),
        ("hidden_act", "gelu", "after blocks.0, at all positions"),
    ],
)
@pytest.mark.usefixtures("few")
def test_a_fault_in_the_settings_is_caught_and_named(tmp_path, field, value, place):
    reader, folder = _export(tmp_path, LLAMA)
    _edit_settings(
        folder, {"rope_parameters": {"rope_type": "default", "rope_theta": value}} if field == "rope" else {field: value}
    )
    findings = _prove(reader, folder)
    assert not findings["weights"].problems
    if place is None:  # shapes no longer fit
        assert "mismatched_keys" in findings["keys"].problems[0]
        assert "k_proj.weight" in findings["keys"].problems[0]
    else:
        assert place in findings["logits"].problems[0]


def _edit_settings(folder, changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.usefixtures("few")
def test_a_window_that_is_missing_shows_beyond_it(tmp_path):
    reader, folder = _export(tmp_path, FAMILIES["mistral"])
    _edit_settings(folder, {"sliding_window": None})
    (problem, *_) = _prove(reader, folder)["logits"].problems
    assert "after blocks.0, only from position 37 of a sequence on" in problem


def test_sequences_reach_beyond_a_window_where_that_is_small(tmp_path):
    wide = replace(FAMILIES["mistral"], max_positions=4096, window=700)
    assert sequence_length(wide) == 732
    assert sequence_length(replace(wide, window=4000)) == 512
    assert sequence_length(replace(wide, max_positions=100, window=90)) == 100


@pytest.mark.usefixtures("few")
def test_settings_that_read_back_otherwise_are_named(tmp_path):
    reader, folder = _export(tmp_path, LLAMA)
    other = replace(LLAMA, norm_epsilon=1e-3, window=None, dropout=0.5, rope=replace(LLAMA.rope, base=77.0))
    assert not prove_config(LLAMA, folder, lambda _: replace(LLAMA, dropout=0.5, init_std=1.0)).problems
    problems = prove_config(LLAMA, folder, lambda _: other).problems
    assert len(problems) == 2
    assert "rope.base: the checkpoint's is 5000.0, config.json says 77.0" in problems
    assert f"norm_epsilon: the checkpoint's is {LLAMA.norm_epsilon}, config.json says 0.001" in problems

    def unreadable(_):
        raise UserError("model_type=mamba")

    assert prove_config(LLAMA, folder, unreadable).problems == ("config.json cannot be read back: model_type=mamba",)
    findings = prove(
        reader,
        Subject(folder=folder, tokenizer=folder),
        rounding=None,
        held_out=Finding(name="held_out_loss"),
        limit=None,
        read_back=lambda _: other,
    )
    assert [finding.name for finding in findings if finding.problems] == ["config"]


@pytest.mark.usefixtures("few")
def test_a_wrong_key_map_is_caught_though_its_inverse_undoes_it(tmp_path, monkeypatch):
    def swapped(rule):
        return replace(rule, foreign=rule.foreign[::-1]) if "gate_up" in rule.logical else rule

    monkeypatch.setitem(FOREIGN, "llama", replace(FOREIGN["llama"], rules=tuple(swapped(rule) for rule in rules_of("llama"))))
    findings = _prove(*_export(tmp_path, LLAMA))
    assert not findings["weights"].problems
    assert "the models part after blocks.0, at all positions" in findings["logits"].problems[0]
    assert findings["held_out_loss"].problems


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("few")
def test_a_folder_of_half_precision_is_compared_as_it_is_stored(tmp_path, dtype):
    reader, folder = _export(tmp_path, LLAMA)
    for path in folder.glob("*.safetensors"):
        save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    assert not [problem for finding in _prove(reader, folder, name).values() for problem in finding.problems]
    assert "are not stored as torch.float32" in _prove(reader, folder, "fp32")["weights"].problems[0]
    assert "differ from the checkpoint's" in _prove(reader, folder, "stored")["weights"].problems[0]
    # A checkpoint of exactly these values, as an import makes it.
    stored = reader.path / "rank-00000.safetensors"
    save_file({key: tensor.to(dtype).float() for key, tensor in load_file(stored).items()}, stored)
    reader.release()
    assert not [problem for finding in _prove(reader, folder, "stored").values() for problem in finding.problems]


def _drop_file(folder, path):
    path.unlink()


def _cut_file(folder, path):
    path.write_bytes(path.read_bytes()[:-100])


def _empty_file(folder, path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("fault", "told"),
    [(_drop_file, "is not there"), (_cut_file, "is no whole safetensors file"), (_empty_file, "is no whole safetensors file")],
)
def test_a_weight_file_that_is_gone_or_cut_is_caught(tmp_path, fault, told):
    reader, folder = _export(tmp_path, LLAMA)
    fault(folder, sorted(folder.glob("*.safetensors"))[1])
    findings = _prove(reader, folder)
    assert "transformers cannot read the folder" in findings["keys"].problems[0]
    assert told in findings["weights"].problems[0]
    assert "logits" not in findings


def test_a_tensor_of_another_shape_and_one_too_many_are_caught(tmp_path):
    reader, folder = _export(tmp_path, LLAMA)
    _edit_weights(folder, "model.norm.weight", lambda weight: weight[:-1])
    findings = _prove(reader, folder)
    assert "mismatched_keys: [\"('model.norm.weight', torch.Size([63])" in findings["keys"].problems[0]
    assert "model.norm.weight has shape [63], expected [64]" in findings["weights"].problems[0]
    _edit_weights(folder, "model.norm.weight", lambda weight: torch.ones(64))
    path = sorted(folder.glob("*.safetensors"))[0]
    save_file(load_file(path) | {"model.norm.weight": torch.ones(64)}, path, metadata={"format": "pt"})
    assert "both hold model.norm.weight" in _prove(reader, folder)["weights"].problems[0]


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
    reader, folder = _export(tmp_path, LLAMA)
    assert not prove_generation(OurModel(reader, LLAMA, None), open_theirs(folder, LLAMA)[0], LLAMA).problems
    other = open_checkpoint(tmp_path / "other", replace(LLAMA, rope=replace(LLAMA.rope, base=900.0)))
    problems = prove_generation(OurModel(other, other.config.model, None), open_theirs(folder, LLAMA)[0], LLAMA).problems
    assert "to transformers" in problems[0]
    # All logits equal: every id is the likeliest.
    path = reader.path / "rank-00000.safetensors"
    save_file({key: tensor * ("head" not in key) for key, tensor in load_file(path).items()}, path)
    reader.release()
    assert not prove_generation(OurModel(reader, LLAMA, None), open_theirs(folder, LLAMA)[0], LLAMA).problems


@pytest.mark.usefixtures("few")
def test_weights_without_end_are_caught_though_both_have_them(tmp_path):
    reader, folder = _export(tmp_path, LLAMA)
    endless = (torch.tensor(7), torch.tensor(0))  # one value, so that the logits are infinite, and none is no number
    _edit_weights(folder, "lm_head.weight", lambda weight: weight.index_put(endless, torch.tensor(torch.inf)))
    path = reader.path / "rank-00000.safetensors"
    tensors = load_file(path)
    tensors["weight/head.weight"].view(-1, 64)[endless] = torch.inf
    save_file(tensors, path)
    reader.release()
    findings = _prove(reader, folder)
    assert findings["weights"].problems == ("1 tensors hold values that are not finite: ['head.weight']",)
    assert "logits are not all finite" in findings["logits"].problems[0]


@pytest.mark.usefixtures("few")
def test_a_large_model_continues_for_fewer_tokens_and_says_so(tmp_path, monkeypatch):
    reader, folder = _export(tmp_path, LLAMA)
    monkeypatch.setattr(outputs, "LARGE", 1000)
    figures = prove_generation(OurModel(reader, LLAMA, None), open_theirs(folder, LLAMA)[0], LLAMA).figures
    assert figures["new_tokens"] == 4
    assert "4 in place of 16" in figures["fewer_new_tokens"]


@pytest.mark.usefixtures("few")
def test_nothing_depends_on_how_much_is_run_at_a_time(tmp_path, monkeypatch):
    reader, folder = _export(tmp_path, FAMILIES["gemma2"])
    whole = _prove(reader, folder)
    for name, value in {"ACTIVATION_BYTES": 1, "LEAST_POSITIONS": 256, "LOGIT_BYTES": 400_000}.items():
        monkeypatch.setattr(rows, name, value)
    monkeypatch.setattr(stored, "CHUNK_ELEMENTS", 1000)
    pieces = _prove(reader, folder)
    assert not [problem for finding in pieces.values() for problem in finding.problems]
    for name, figure in [("perplexity", "transformers"), ("perplexity", "longhaul"), ("held_out_loss", "transformers")]:
        assert pieces[name].figures[figure] == pytest.approx(whole[name].figures[figure], rel=1e-6)


def test_a_folder_that_transformers_cannot_read(tmp_path):
    _, folder = _export(tmp_path, LLAMA)
    (folder / "config.json").unlink()
    theirs, finding = open_theirs(folder, LLAMA)
    assert theirs is None
    assert "cannot read the folder" in finding.problems[0]


def test_weights_that_transformers_makes_of_others_are_refused(tmp_path, monkeypatch):
    _, folder = _export(tmp_path, LLAMA)

    def merged(promise, *, device=None, dtype=None):
        return torch.nn.Parameter(torch.empty(promise.get_shape(), device="meta"), requires_grad=False)

    monkeypatch.setattr(stored.Promise, "to", merged)
    theirs, finding = open_theirs(folder, LLAMA)
    assert theirs is None
    assert "of several tensors, which the proof cannot follow" in finding.problems[0]


def test_weights_are_read_for_a_use_and_dropped_after_it(tmp_path):
    reader, folder = _export(tmp_path, replace(LLAMA, tied_head=True))
    theirs, _ = open_theirs(folder, LLAMA)
    held = []
    theirs.hidden(
        outputs.random_rows(LLAMA), lambda *_: held.append(sum(not each.is_meta for each in theirs.module.parameters()))
    )
    assert len(held) == LLAMA.num_layers + 2
    assert max(held) == 0  # between two layers none is there
    for _ in theirs.logits(torch.zeros(3, LLAMA.hidden_size)):
        assert not theirs.module.lm_head.weight.is_meta
    assert all(each.is_meta for each in theirs.module.parameters())
