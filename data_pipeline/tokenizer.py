"""Tokenizers in Hugging Face's format: train a byte-level BPE, take over any other, and know the bytes behind every id.

Which program encodes is engines.py's matter; the ids are defined here, by the `tokenizers` library.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError
from data_pipeline.config import TokenizerConfig
from data_pipeline.io import read_json, sha256_of, write_json

TOKENIZER_FILE, GENERATION_FILE = "tokenizer.json", "generation_config.json"
# Files that a tokenizer folder may hold; model weights that lie beside them are not taken along.
TOKENIZER_FILES = (
    TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    GENERATION_FILE,
)  # fmt: skip
# Contractions; a word with the one sign before it; up to three digits; signs with their line ends; line ends; other blanks.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_SPACE = "\u2581"


class Tokenizer:
    """A tokenizer folder, opened. Text that spells a special token is encoded as text, so no document can forge one."""

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError when the folder holds no tokenizer that can be read."""
        import tokenizers

        self.folder = Path(folder)
        file = self.folder / TOKENIZER_FILE
        if not file.is_file():
            raise UserError(f"{self.folder}: holds no {TOKENIZER_FILE}; give the folder of a Hugging Face tokenizer")
        self.json = file.read_text(encoding="utf-8")
        try:
            self.backend = tokenizers.Tokenizer.from_str(self.json)
        except Exception as error:  # noqa: BLE001  (the library raises bare Exception for a file it cannot parse)
            raise UserError(f"{file}: the tokenizers library cannot read it: {error}") from None
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.text_size = max(set(vocabulary.values()) - self.special_ids, default=-1) + 1
        """Ids below this are all that text can become: special tokens may lie beyond the rows of a model's embedding."""
        self._added = {number: token.content for number, token in added.items()}
        self._text_of = {number: text for text, number in vocabulary.items()}
        self.sha256 = sha256_of(file)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`; nothing is put before or after it.

        `special`: text that spells a special token becomes that token; for prompts that a chat template has made.
        """
        self.backend.encode_special_tokens = not special
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        finally:
            self.backend.encode_special_tokens = True

    def encode_all(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Ids of each text as `encode` gives them, by all cores."""
        self.backend.encode_special_tokens = not special
        try:
            return [encoded.ids for encoded in self.backend.encode_batch(list(texts), add_special_tokens=False)]
        finally:
            self.backend.encode_special_tokens = True

    def opening(self) -> list[int]:
        """Ids that the tokenizer puts before a text of its own accord, such as a beginning-of-sequence; often none."""
        bare = self.encode("a")
        whole = self.backend.encode("a", add_special_tokens=True).ids
        places = [place for place in range(len(whole) - len(bare) + 1) if whole[place : place + len(bare)] == bare]
        return whole[: places[0]] if places else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens have none."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def end_of_document(self, wanted: str | None = None) -> tuple[int, str]:
        """Id and text of the token that closes a document: `wanted`, or the tokenizer's own eos_token.

        Raises UserError when there is none, or it is no special token.
        """
        token = wanted if wanted is not None else self._eos_token()
        if token is None:
            raise UserError(
                f"{self.folder}: the tokenizer names no eos_token, so nothing would mark the end of a document; give "
                f"tokenizer.end_of_document=TOKEN, one of: {self._special_words()}"
            )
        number = self.backend.token_to_id(token)
        if number is None:
            raise UserError(
                f"tokenizer.end_of_document={token!r}: not in the vocabulary of {self.folder}; give one of: "
                f"{self._special_words()}"
            )
        if number not in self.special_ids:
            raise UserError(
                f"tokenizer.end_of_document={token!r}: an ordinary token of {self.folder}, which text can spell, so documents "
                f"would be cut at it; give a special token, one of: {self._special_words()}"
            )
        return number, token

    @functools.cached_property
    def token_table(self) -> list[bytes]:
        """Bytes that each id stands for; none for special tokens and for unused ids.

        Raises UserError for a kind of tokenizer whose tokens are not bytes of the text, such as WordPiece.
        """
        to_bytes = self._byte_rule()
        table = [b""] * self.vocab_size
        for number, text in self._text_of.items():
            if number in self.special_ids:
                continue
            table[number] = self._added[number].encode() if number in self._added else to_bytes(text)
        return table

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of every id, int32 [vocab_size]; special tokens have none."""
        return np.array([len(piece) for piece in self.token_table], dtype=np.int32)

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one by one."""
        return StreamDecoder(self.token_table)

    def _byte_rule(self) -> Any:
        """The function from a token's spelling to its bytes, by the kind of tokenizer."""
        content = json.loads(self.json)
        kinds = {kind for part in ("pre_tokenizer", "decoder") for kind in _types_in(content.get(part))}
        if "ByteLevel" in kinds:
            return functools.partial(_byte_level_bytes, _byte_level_alphabet())
        if content["model"].get("byte_fallback") or "Metaspace" in kinds:
            return _sentencepiece_bytes
        raise UserError(
            f"{self.folder}: its tokens ({content['model'].get('type')}) do not stand for the bytes of the text, so neither "
            "can text be restored nor bits per byte counted; take a byte-level or SentencePiece tokenizer"
        )

    def _eos_token(self) -> str | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = self.folder / name
            token = read_json(path).get("eos_token") if path.is_file() else None
            if token:
                return token["content"] if isinstance(token, dict) else token
        return None

    @property
    def special_texts(self) -> list[str]:
        """Special tokens as text, in the order of their ids."""
        return [self._added[number] for number in sorted(self.special_ids)]

    def _special_words(self) -> str:
        return ", ".join(self.special_texts[:20]) or "(it has no special tokens)"


class StreamDecoder:
    """Text of ids that come one by one, without ever giving out half a character."""

    def __init__(self, token_table: Sequence[bytes]) -> None:
        self._table = token_table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that is complete with this id; empty while a character still lacks bytes, and for special tokens."""
        return self._decoder.decode(self._table[token_id])

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character was cut off."""
        return self._decoder.decode(b"", final=True)


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str], folder: Path) -> None:
    """Train a byte-level BPE on `texts` and write a complete tokenizer folder that AutoTokenizer loads."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    if config.pretokenizer == "llama3":
        words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_only])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=list(config.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    end, *extra = config.special_tokens
    # No pad_token: were it the end token, masking the padding would mask the end of every answer in fine-tuning.
    special = {"eos_token": end, **({"additional_special_tokens": extra} if extra else {})}
    write_json(folder / TOKENIZER_FILE, json.loads(backend.to_str()))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special},
    )
    write_json(folder / "special_tokens_map.json", special)


def adopt_tokenizer(source: str | Path, folder: Path) -> None:
    """Copy an existing tokenizer, byte for byte; one without tokenizer.json is converted by transformers first.

    Raises UserError when `source` holds no tokenizer.
    """
    source = Path(source).expanduser()
    if not source.is_dir():
        raise UserError(f"tokenizer.path={source}: no such folder; give the folder of a Hugging Face tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    if not (source / TOKENIZER_FILE).is_file():
        _convert(source, folder)
        return
    is_model = (source / "config.json").is_file()
    for name in TOKENIZER_FILES:
        # How one model is sampled from is no matter of another that is trained with its tokenizer.
        if (source / name).is_file() and not (is_model and name == GENERATION_FILE):
            shutil.copyfile(source / name, folder / name)


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), use_fast=True, local_files_only=True, trust_remote_code=False)
        fast = tokenizer.is_fast
    except Exception as error:  # noqa: BLE001  (conversion fails in as many ways as there are tokenizers)
        words = " ".join(str(error).split())[:300]
        raise UserError(
            f"tokenizer.path={source}: holds no {TOKENIZER_FILE}, and transformers cannot make one of what is there: {words}"
        ) from error
    if not fast:
        raise UserError(f"tokenizer.path={source}: has no fast form; save it with a {TOKENIZER_FILE} first")
    tokenizer.save_pretrained(str(folder))


def _types_in(part: Any) -> list[str]:
    """All `type` names in a part of tokenizer.json, those inside a Sequence included."""
    if isinstance(part, dict):
        own = [part["type"]] if isinstance(part.get("type"), str) else []
        return own + [kind for value in part.values() for kind in _types_in(value)]
    if isinstance(part, list):
        return [kind for value in part for kind in _types_in(value)]
    return []


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte: itself where printable, else the next one from U+0100 on (GPT-2)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\u00a1"), ord("\u00ac") + 1),
        *range(ord("\u00ae"), ord("\u00ff") + 1),
    ]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet


def _byte_level_bytes(alphabet: dict[str, int], text: str) -> bytes:
    if all(sign in alphabet for sign in text):
        return bytes(alphabet[sign] for sign in text)
    return text.encode()


def _sentencepiece_bytes(text: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.replace(_SENTENCEPIECE_SPACE, " ").encode()
