"""Ids of the tokens that a tokenizer folder gives a role, such as the end of a document."""

from __future__ import annotations

from typing import Literal

from conf.errors import UserError
from data_pipeline.io import read_json
from data_pipeline.tokenizer import Tokenizer


def special_id(tokenizer: Tokenizer, role: Literal["bos_token", "eos_token", "pad_token"]) -> int | None:
    """The id that has this role; None when the tokenizer gives it to no token.

    Raises UserError when the named token is not in the vocabulary.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tokenizer.folder / name
        token = read_json(path).get(role) if path.is_file() else None
        if isinstance(token, dict):  # older files hold the token with its matching rules
            token = token["content"]
        if token is not None:
            number = tokenizer.backend.token_to_id(token)
            if number is None:
                raise UserError(f"{path}: names {token!r} as its {role}, which tokenizer.json lacks")
            return number
    return None
