"""Tokenizers against transformers, the bytes behind ids, streaming, and the proof that lets gigatoken encode."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.config import TokenizerConfig
from data_pipeline.engines import HARD_TEXTS, GigatokenEngine, HuggingFaceEngine, choose_engine, open_engine
from data_pipeline.tokenizer import Tokenizer, adopt_tokenizer, train_tokenizer
from tests.unit.data_pipeline.corpora import some_texts

TEXTS = some_texts(200)


@pytest.fixture(scope="module", params=["llama3", "gpt2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    config = TokenizerConfig(vocab_size=400, pretokenizer=request.param, extra_special_tokens=("<|user|>",))
    train_tokenizer(config, TEXTS, folder)
    return Tokenizer(folder)


def sentencepiece_like(folder: Path) -> Tokenizer:
    """A BPE with byte fallback and a sign for the space, as Llama 2 has it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "\u00e9"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return Tokenizer(folder)


def test_transformers_loads_what_was_trained(trained: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(trained.folder), local_files_only=True)
    assert theirs.eos_token == "<|endoftext|>" and theirs.eos_token_id == 0 and len(theirs) == trained.vocab_size == 400
    for text in [*TEXTS[:20], *HARD_TEXTS]:
        ids = trained.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert trained.decode(ids) == text


def test_text_cannot_forge_special_tokens(trained: Tokenizer) -> None:
    ids = trained.encode("a<|endoftext|>b<|user|>")
    assert not trained.special_ids & set(ids) and trained.decode(ids) == "a<|endoftext|>b<|user|>"


def test_token_bytes_add_up_to_the_text(trained: Tokenizer) -> None:
    sizes = trained.token_bytes()
    assert sizes.dtype == np.int32 and sizes.shape == (400,)
    assert all(sizes[number] == 0 for number in trained.special_ids)
    for text in [*TEXTS[:20], *HARD_TEXTS]:
        ids = trained.encode(text)
        assert sizes[ids].sum() == len(text.encode())
        assert b"".join(trained.token_table[number] for number in ids) == text.encode()


def test_token_bytes_of_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(tmp_path)
    text = "ab a \u4e16\u00e9"
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.end_of_document() == (2, "</s>")
    stream = tokenizer.stream()
    assert "".join(stream.push(number) for number in ids) == text


def test_token_bytes_of_a_lossy_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokens \(WordPiece\) do not stand for the bytes"):
        Tokenizer(tmp_path).token_bytes()


def test_stream_never_gives_half_a_character(trained: Tokenizer) -> None:
    text = "a\u4e16\U0001f469\u200d\U0001f466 \u00e9\u0e2a!" * 3
    stream = trained.stream()
    pieces = [stream.push(number) for number in trained.encode(text)]
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) + stream.flush() == text
    assert any(piece == "" for piece in pieces)  # some characters take several tokens
    assert stream.push(0) == ""  # a special token
    cut = trained.stream()
    assert cut.push(trained.encode("\U0001f469")[0]) == "" and cut.flush() == "\ufffd"


def test_end_of_document(trained: Tokenizer, tmp_path: Path) -> None:
    assert trained.end_of_document() == (0, "<|endoftext|>")
    assert trained.end_of_document("<|user|>") == (1, "<|user|>")
    with pytest.raises(UserError, match=r"end_of_document='</s>': not in the vocabulary .*one of: <\|endoftext\|>, <\|user\|>"):
        trained.end_of_document("</s>")
    adopt_tokenizer(trained.folder, tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="names no eos_token"):
        Tokenizer(tmp_path).end_of_document()


def test_adopting_copies_byte_for_byte_and_leaves_weights(trained: Tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "model"
    adopt_tokenizer(trained.folder, source)
    (source / "model.safetensors").write_bytes(b"weights")
    adopt_tokenizer(source, tmp_path / "copy")
    names = sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert names == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert all((tmp_path / "copy" / name).read_bytes() == (trained.folder / name).read_bytes() for name in names)


def test_folders_that_hold_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.path=.*gone: no such folder"):
        adopt_tokenizer(tmp_path / "gone", tmp_path / "copy")
    with pytest.raises(UserError, match=r"holds no tokenizer.json, and transformers cannot make one"):
        adopt_tokenizer(tmp_path, tmp_path / "copy")
    with pytest.raises(UserError, match="holds no tokenizer.json; give the folder"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="the tokenizers library cannot read it"):
        Tokenizer(tmp_path)


class TestEngines:
    def test_both_give_the_same(self, trained: Tokenizer) -> None:
        pytest.importorskip("gigatoken", reason="gigatoken is not installed here")
        texts = [*TEXTS, *HARD_TEXTS, "a<|endoftext|>b"]
        ids, counts = HuggingFaceEngine(trained).encode(texts)
        fast_ids, fast_counts = GigatokenEngine(trained).encode(texts)
        assert np.array_equal(ids, fast_ids) and np.array_equal(counts, fast_counts)
        assert ids.tolist() == [number for text in texts for number in trained.encode(text)]
        for name in ("hf", "gigatoken"):
            empty_ids, empty_counts = open_engine(name, trained).encode([])
            assert empty_ids.size == empty_counts.size == 0

    def test_auto_says_what_it_chose(self, trained: Tokenizer) -> None:
        pytest.importorskip("gigatoken", reason="gigatoken is not installed here")
        choice = choose_engine(trained, "auto", sample=TEXTS)
        assert choice.name == "gigatoken" and "ids equal" in choice.reason and choice.megabytes_per_second > 0
        assert choose_engine(trained, "hf", sample=TEXTS).name == "hf"

    def test_not_installed(self, trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gigatoken", None)
        choice = choose_engine(trained, "auto", sample=TEXTS)
        assert choice.name == "hf" and "not installed" in choice.reason
        with pytest.raises(UserError, match="engine=gigatoken: it is not installed"):
            choose_engine(trained, "gigatoken", sample=TEXTS)

    def test_different_ids(self, trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("gigatoken", reason="gigatoken is not installed here")

        class Wrong(GigatokenEngine):
            def encode(self, texts_D: object) -> tuple[np.ndarray, np.ndarray]:
                ids, counts = super().encode(texts_D)  # type: ignore[arg-type]
                ids = ids.copy()
                if len(counts) > 1:
                    ids[counts[0]] += 1  # in the second text
                return ids, counts

        monkeypatch.setattr("data_pipeline.engines.GigatokenEngine", Wrong)
        choice = choose_engine(trained, "auto", sample=TEXTS)
        assert choice.name == "hf" and repr(TEXTS[1][:40]) in choice.reason
        with pytest.raises(UserError, match="its ids differ from Hugging Face's, first for the text"):
            choose_engine(trained, "gigatoken", sample=TEXTS)

    def test_a_tokenizer_it_cannot_read(self, trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: object, tokenizer: Tokenizer) -> None:
            raise ValueError("unknown pretokenizer")

        monkeypatch.setattr(GigatokenEngine, "__init__", refuse)
        choice = choose_engine(trained, "auto", sample=TEXTS)
        assert choice.name == "hf" and "cannot work with this tokenizer (ValueError: unknown pretokenizer)" in choice.reason
