"""Tokenizers of every kind go in and come out byte for byte, with the words around them; transformers reads what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationConfig

from data_pipeline.tokenizer import Tokenizer as Opened
from tests.parity.foreign import build, save
from train.config.export import ExportConfig
from train.config.hf_import import ImportConfig
from train.convert.proof.files import prove_tokenizer
from train.stages import export, hf_import

TEXTS = ["def main(argv):\n    return 0", "naïve — 日本語 😀", "the text of nothing, then again and again"] * 5
SAMPLE = "naïve 日本語 😀\n\tif x != 1.5e-3: return  'don\\'t' "
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level() -> Tokenizer:
    """Of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=list(CHAT), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Of Llama 2, Mistral and Gemma: blanks are a sign of their own, and what is unknown falls back to bytes."""
    special = ["<unk>", "<s>", "</s>", *CHAT]
    trainer = trainers.BpeTrainer(vocab_size=30, special_tokens=special, show_progress=False)
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(["the text of nothing"], trainer)
    content = json.loads(trained.to_str())
    vocabulary = dict(content["model"]["vocab"])
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    content["model"] |= {"vocab": vocabulary, "byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["in-settings", "file"])
def test_a_tokenizer_there_and_back(kind, template, tmp_path):
    folder = save(build("llama"), tmp_path / "theirs")
    tokenizer = KINDS[kind]()
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "special_tokens_map.json": json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}}) + "   ",
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "model_max_length": 77}
            | ({"chat_template": TEMPLATE} if template == "in-settings" else {})
        ),
    }
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if template == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    GenerationConfig(eos_token_id=ends, temperature=0.6, do_sample=True).save_pretrained(folder)
    files["generation_config.json"] = (folder / "generation_config.json").read_text()
    before = AutoTokenizer.from_pretrained(folder)

    hf_import.run(ImportConfig(hf=str(folder), out=str(tmp_path / "ours"), proof=False))
    out = tmp_path / "back"
    export.run(ExportConfig(checkpoint=str(tmp_path / "ours"), out=str(out), proof=False))

    for name, text in files.items():
        assert (out / name).read_text(encoding="utf-8") == text, name
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    assert GenerationConfig.from_pretrained(out).eos_token_id == ends
    after = AutoTokenizer.from_pretrained(out)
    assert after(SAMPLE).input_ids == before(SAMPLE).input_ids
    messages = [{"role": "user", "content": "naïve?"}]
    chat = after.apply_chat_template(messages, tokenize=False)
    assert chat == "<|im_start|>user\nnaïve?<|im_end|>\n"
    assert after(chat).input_ids == before(chat).input_ids
    assert tokenizer.token_to_id("<|im_start|>") in after(chat).input_ids
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == ends[0]


def test_what_a_tokenizer_opens_a_text_with_is_known(tmp_path):
    tokenizer = sentencepiece()
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    assert Opened(tmp_path).opening() == []
    begin, end = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    assert Opened(tmp_path).opening() == [begin]


def test_a_class_that_reads_its_file_otherwise_is_told(tmp_path):
    """Releases of transformers make some classes anew, and leave the file's own splitting out."""
    tokenizer = byte_level()
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    split, tokenizer.pre_tokenizer = tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(["1234567 1234567 3.14159 HELLO'LL"] * 9, trainer)
    tokenizer.pre_tokenizer = split
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    finding = prove_tokenizer(tmp_path, tmp_path)
    same = AutoTokenizer.from_pretrained(tmp_path)("1234567").input_ids == tokenizer.encode("1234567").ids
    assert finding.problems == ()
    assert same or "reads tokenizer.json otherwise than it says" in finding.figures["note"]


def test_the_working_folder_holds_nothing_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save(build("llama"), Path("theirs"))
    hf_import.run(ImportConfig(hf=str(folder), proof=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imported", "theirs"]
    assert [path.name for path in (tmp_path / "imported").iterdir()] == ["theirs"]
