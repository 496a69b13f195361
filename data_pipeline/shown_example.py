"""One encoded row as text for a terminal, special tokens included, with what the model learns to write marked."""

from __future__ import annotations

import itertools

from conf.errors import UserError
from data_pipeline.encoded_rows import EncodedRows
from data_pipeline.manifest import Split
from data_pipeline.row_encoding import IGNORE
from data_pipeline.tokenizer import Tokenizer

GREEN, RESET = "\x1b[32m", "\x1b[0m"
MOST_TOKENS = 512


def shown_example(
    encoded: EncodedRows, tokenizer: Tokenizer, *, colour: bool, split: Split = "train", row: int = 0, most: int = MOST_TOKENS
) -> str:
    """The text of a row; its targets are green with `colour`, and otherwise between \u27e6 and \u27e7.

    Of a longer row the last `most` tokens; what is learned of a classification is its label, at the end.
    """
    arrays = encoded.arrays(split)
    first, last = arrays.row_starts_R1[row : row + 2].tolist()
    inputs_N, labels_N = arrays.tokens_N[first:last], arrays.labels_N[first:last]
    before, after = (GREEN, RESET) if colour else ("\u27e6", "\u27e7")
    if encoded.kind == "classification":
        label = encoded.labels[int(labels_N[-1])]
        cut = "... " if len(inputs_N) > most else ""
        return f"{cut}{_text(tokenizer, inputs_N[-most:].tolist())} -> {before}{label}{after}"
    ids = [*inputs_N.tolist(), int(labels_N[-1])]
    flags = [False, *(labels_N != IGNORE).tolist()]
    if not flags[-1]:
        ids, flags = ids[:-1], flags[:-1]
    shown = list(zip(ids, flags, strict=True))[-most:]
    pieces = ["... "] if len(ids) > len(shown) else []
    for is_target, run in itertools.groupby(shown, key=lambda pair: pair[1]):
        text = _text(tokenizer, [token for token, _ in run])
        pieces.append(f"{before}{text}{after}" if is_target else text)
    return "".join(pieces)


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of ids with their special tokens; signs that would steer the terminal are spelled out."""
    try:
        table = tokenizer.token_table
    except UserError:  # tokens that are no bytes of the text, as WordPiece's
        return " ".join(str(tokenizer.backend.id_to_token(token)) for token in ids)
    pieces = [
        tokenizer.backend.id_to_token(token).encode() if token in tokenizer.special_ids else table[token] for token in ids
    ]
    text = b"".join(pieces).decode(errors="replace")
    return "".join(sign if sign in "\n\t" or sign.isprintable() else repr(sign)[1:-1] for sign in text)
