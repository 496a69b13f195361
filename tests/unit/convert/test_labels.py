"""Models that tell labels apart, to Hugging Face and back: the files, the proof, and where a row's label is taken from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from conf.errors import ConfigError, UserError
from data_pipeline.tokenizer import Tokenizer
from tests.parity.foreign import save
from tests.parity.pairs import CASES as PARITY_CASES
from tests.unit.convert.checkpoints import VOCAB_SIZE, open_checkpoint, write_checkpoint
from train.checkpoint.reader import CheckpointReader
from train.config.export import ExportConfig
from train.config.hf_import import ImportConfig
from train.config.model import ModelConfig
from train.convert.families import FAMILIES
from train.convert.hf_config import check_expressible, read_model_config
from train.convert.hf_export import padding_id, plan_weights, write_model
from train.convert.proof import outputs
from train.convert.proof.checks import Subject, prove
from train.convert.proof.finding import Finding
from train.convert.prove import ROUNDINGS, find_held_out
from train.convert.publication import REPORT
from train.inference.classify import Classifier
from train.inference.load import load_decoder
from train.parallel import single_process
from train.stages import export, hf_import

LABELS = ("no", "may be", "yes")
CASES = {
    name: replace(model, vocab_size=VOCAB_SIZE, labels=LABELS)
    for name, model in PARITY_CASES.items()
    if name not in ("qwen2-tied-linear", "stablelm-qkv-bias", "gpt2-untied", "llama-head-size")
}
END = 0  # id of the sample tokenizer's end token
ROWS = [[5, 9, 200, 31], [7], [11, 12, END], [*range(3, 120)]]
TOLERANCE = 1e-5
FOUND = ("keys", "weights", "config", "tokenizer", "logits", "rows", "held_out_loss")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A fault needs not a thousand positions to show."""
    monkeypatch.setattr(outputs, "MIN_POSITIONS", 100)


def exported(tmp_path: Path, model: ModelConfig, *, pad: str | None = None, dtype: str = "fp32") -> tuple:
    """(the checkpoint, its export); `pad`: the tokenizer's token of padding."""
    reader = open_checkpoint(tmp_path / "run", model)
    if pad is not None:
        settings = reader.tokenizer_folder / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": pad}))
    folder = tmp_path / "hf"
    folder.mkdir()
    write_model(reader, plan_weights(reader, dtype, shard_bytes=100_000), folder, dtype=dtype)
    return reader, folder


def proved(reader: CheckpointReader, folder: Path, dtype: str = "fp32") -> dict[str, Finding]:
    findings = prove(
        reader,
        Subject(folder=folder, tokenizer=reader.tokenizer_folder),
        rounding=ROUNDINGS[dtype],
        held_out=find_held_out(reader),
        limit=None,
        read_back=lambda path: read_model_config(path).model,
    )
    return {finding.name: finding for finding in findings}


def our_scores(reader: CheckpointReader, rows: list[list[int]]) -> torch.Tensor:
    decoder = load_decoder(reader, torch.float32, device=torch.device("cpu"))
    classifier = Classifier(decoder, reader.model, context=single_process(), batch_tokens=300)
    return torch.tensor(classifier.classify(rows))


@torch.no_grad()
def their_scores(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """Each row alone."""
    return torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows]).log_softmax(dim=-1)


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("case", CASES)
def test_an_export_computes_the_same_is_proved_and_comes_back(case, tmp_path):
    reader, folder = exported(tmp_path, CASES[case])
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(theirs).__name__.endswith("ForSequenceClassification")
    assert theirs.config.architectures == [type(theirs).__name__]
    assert theirs.config.id2label == dict(enumerate(LABELS)) and theirs.config.label2id["yes"] == 2
    assert theirs.config.num_labels == 3 and theirs.config.pad_token_id is None
    assert not (folder / "generation_config.json").exists()
    torch.testing.assert_close(their_scores(theirs, ROWS), our_scores(reader, ROWS), rtol=TOLERANCE, atol=TOLERANCE)

    findings = proved(reader, folder)
    assert {name: finding.problems for name, finding in findings.items()} == dict.fromkeys(FOUND, ())
    assert findings["rows"].figures["end_token_last"] == "yes" and findings["rows"].figures["rows"] == 5
    assert findings["logits"].figures["argmax_equal"] >= 100

    assert hf_import.run(ImportConfig(hf=str(folder), out=str(tmp_path / "back"), proof=False)) == 0
    back = CheckpointReader(tmp_path / "back")
    assert back.model.labels == LABELS and tuple(back.names) == tuple(reader.names)
    for name in reader.names:
        rows = VOCAB_SIZE if name == "embedding.tokens.weight" else None  # padding rows are cut
        assert torch.equal(back.read(name)[:rows], reader.read(name)[:rows]), name


def test_an_export_in_half_precision_is_proved(tmp_path):
    findings = proved(*exported(tmp_path, CASES["llama-gqa"], dtype="bf16"), "bf16")
    assert not [problem for finding in findings.values() for problem in finding.problems]


THEIRS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForSequenceClassification),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForSequenceClassification),
    "gpt2": (transformers.GPT2Config, transformers.GPT2ForSequenceClassification),
}


def their_folder(case: str, folder: Path, **fields) -> Path:
    """A model made and saved by transformers alone."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "max_position_embeddings": 160}
    more = {"vocab_size": VOCAB_SIZE, "intermediate_size": 80, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    make_config, make = THEIRS[case]
    torch.manual_seed(3)
    model = make(make_config(**(sizes | more | names | {"initializer_range": 0.2, "pad_token_id": END} | fields)))
    return save(model.eval(), folder)


@pytest.mark.parametrize("case", THEIRS)
def test_a_model_of_transformers_there_and_back(case, tmp_path, capsys):
    """Their id of padding is their end token, as it often is; rows that do not end in it are read alike."""
    folder = their_folder(case, tmp_path / "theirs")
    assert hf_import.run(ImportConfig(hf=str(folder), out=str(tmp_path / "ours"), proof=False)) == 0
    assert "pad_token_id=0: transformers tells the label at a row's last token that is not this one" in capsys.readouterr().err
    reader = CheckpointReader(tmp_path / "ours")
    assert reader.model.labels == ("bad", "good")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    rows = [row for row in ROWS if row[-1] != END]
    torch.testing.assert_close(our_scores(reader, rows), their_scores(theirs, rows), rtol=TOLERANCE, atol=TOLERANCE)
    assert not [problem for finding in proved(reader, folder, "stored").values() for problem in finding.problems]

    assert export.run(ExportConfig(checkpoint=str(reader.path), out=str(tmp_path / "back"), proof=False)) == 0
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys() and "score.weight" in after
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


REFUSED = {
    "a-number": ({"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}, "only two labels or more, numbered from 0"),
    "several-at-once": ({"problem_type": "multi_label_classification"}, "problem_type=multi_label_classification is not"),
    "doubles": ({"id2label": {"0": "good", "1": "good"}}, r"read as model\.labels: hold good more than once"),
    "another-class": ({"architectures": ["LlamaForTokenClassification"]}, "and LlamaForSequenceClassification, which tells"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_classes_that_our_head_is_not(case, tmp_path):
    folder = their_folder("llama", tmp_path / "theirs")
    fields, words = REFUSED[case]
    edit_config(folder, **fields)
    with pytest.raises((UserError, ConfigError), match=words):
        hf_import.run(ImportConfig(hf=str(folder), out=str(tmp_path / "ours"), proof=False))


def test_a_family_without_such_a_class_is_told(monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], classifier=None))
    with pytest.raises(UserError, match=r"model\.labels=.*: transformers has no class of llama that tells labels apart"):
        check_expressible(CASES["llama-gqa"])
    check_expressible(replace(CASES["llama-gqa"], labels=()))


# --- padding


def test_a_token_of_padding_lets_transformers_read_several_rows(tmp_path):
    reader, folder = exported(tmp_path, CASES["llama-gqa"], pad="z")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    pad = Tokenizer(reader.tokenizer_folder).backend.token_to_id("z")
    assert theirs.config.pad_token_id == pad == padding_id(Tokenizer(reader.tokenizer_folder), reader.model)
    length = max(map(len, ROWS))
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ROWS])
    with torch.no_grad():
        together = theirs(input_ids=ids, attention_mask=mask).logits.log_softmax(dim=-1)
    torch.testing.assert_close(together, our_scores(reader, ROWS), rtol=TOLERANCE, atol=TOLERANCE)
    figures = proved(reader, folder)["rows"].figures
    assert (figures["filled_up"], figures["end_token_last"]) == ("yes", "yes")


def test_the_end_token_is_no_padding(tmp_path):
    """transformers would read a row that ends in it one token early, without a word."""
    reader, folder = exported(tmp_path, CASES["llama-gqa"], pad="<|endoftext|>")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == END and theirs.config.pad_token_id is None
    torch.testing.assert_close(their_scores(theirs, ROWS), our_scores(reader, ROWS), rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(ValueError, match="batch sizes > 1"):
        theirs(input_ids=torch.tensor([[1, 2], [3, 4]]))


def test_padding_beyond_the_embedding_is_none(tmp_path):
    reader = exported(tmp_path, CASES["llama-gqa"], pad="z")[0]
    tokenizer = Tokenizer(reader.tokenizer_folder)
    small = replace(reader.model, vocab_size=tokenizer.backend.token_to_id("z"))
    assert padding_id(tokenizer, small) is None


# --- faults


def _swap_scores(folder: Path) -> None:
    path = next(path for path in folder.glob("*.safetensors") if "score.weight" in load_file(path))
    weights = load_file(path)
    weights["score.weight"] = weights["score.weight"].flip(0).contiguous()
    save_file(weights, path, metadata={"format": "pt"})


FAULTS = {
    "scores-swapped": (
        _swap_scores,
        {"weights": "differ from the checkpoint's", "logits": "in the head", "rows": "rows alone"},
    ),
    "end-is-padding": (lambda folder: edit_config(folder, pad_token_id=END), {"rows": "scores of rows alone differ"}),
    "names-swapped": (
        lambda folder: edit_config(folder, id2label={"0": "yes", "1": "may be", "2": "no"}),
        {"config": "labels: the checkpoint's is"},
    ),
    "a-label-more": (
        lambda folder: edit_config(folder, id2label={str(n): f"l{n}" for n in range(4)}, num_labels=4),
        {"keys": "mismatched_keys"},
    ),
    "a-language-model": (lambda folder: edit_config(folder, architectures=["LlamaForCausalLM"]), {"config": "labels"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_and_named(fault, tmp_path):
    reader, folder = exported(tmp_path, CASES["llama-gqa"])
    change, expected = FAULTS[fault]
    change(folder)
    findings = proved(reader, folder)
    for name, words in expected.items():
        assert any(words in problem for problem in findings[name].problems), findings[name]
    if fault == "end-is-padding":
        assert [name for name, finding in findings.items() if finding.problems] == ["rows"]


# --- the command


@pytest.mark.further
def test_the_command_proves_and_the_card_says_how_to_use_it(tmp_path, capsys):
    write_checkpoint(tmp_path / "run", CASES["gpt2"])
    assert export.run(ExportConfig(checkpoint=str(tmp_path / "run"), out=str(tmp_path / "hf"))) == 0
    report = json.loads((tmp_path / "hf" / REPORT).read_text())
    assert report["proved"] and set(report["proof"]) == set(FOUND)
    shown = capsys.readouterr().out
    assert "likeliest labels equal" in shown and "scores of 3 labels differ by at most" in shown
    assert "not measured: the model tells labels apart" in shown
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "AutoModelForSequenceClassification" in card
    assert "| labels | no, may be, yes |" in card and "tells 3 labels apart" in card and "; head" not in card
    assert "It continues text" not in card and "rows, alone" in card
