"""The tokenizer of a checkpoint, as generation and export need it: text to ids, ids to text as they come, special ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from conf.errors import UserError


class Vocabulary:
    """A Hugging Face tokenizer folder.

    Raises UserError when the folder is incomplete or its special tokens are not in the vocabulary.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        settings = _read_json(folder / "tokenizer_config.json")
        self.size: int = self._tokenizer.get_vocab_size()
        self.bos_id = self._id_of(settings.get("bos_token"), folder)
        self.eos_id = self._id_of(settings.get("eos_token"), folder)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of `text` alone, as documents were encoded for training: nothing is put before or behind."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def stream(self, prompt: Sequence[int]) -> IdStream:
        """The text of ids that follow `prompt`, one at a time."""
        return IdStream(self._tokenizer, prompt)

    def _id_of(self, token: Any, folder: Path) -> int | None:
        if isinstance(token, dict):  # older files hold the token with its matching rules
            token = token.get("content")
        if token is None:
            return None
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f"{folder / 'tokenizer_config.json'}: names the token {token!r}, which tokenizer.json lacks")
        return token_id


class IdStream:
    """Ids in, text out; a character whose bytes are not all there yet waits."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # The prompt goes first: decoders of the SentencePiece kind drop the space before the first word of a text.
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        """The text that is certain after one more id; may be empty."""
        return self._stream.step(self._tokenizer, token_id) or ""


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise UserError(f"{path}: no such file; the checkpoint lacks its tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a file that it cannot read
        raise UserError(f"{path}: is no tokenizer ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
