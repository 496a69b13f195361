"""Preferences as token ids: two rows with one prompt, which are cut alike, so that both fit into one sequence. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data_pipeline.records import BadRow, Fault
from data_pipeline.row_encoding import EncodedRow, RowEncoder, Tokens
from data_pipeline.tasks import Row

ROWS_OF_A_PAIR = 2
"""The preferred one, and behind it the other; they lie side by side wherever rows lie."""
Pair = list[tuple[Row, EncodedRow]]


def encode_pairs(encoder: RowEncoder, pairs: Sequence[Row], *, as_turns: bool) -> list[Pair | BadRow]:
    """Each of the preferences as its two rows. as_turns: write texts out as dialogues of a question and its answer."""
    rows = [row for pair in pairs for row in _apart(pair)]
    if as_turns:
        rows = [row if row.messages else _turns(row) for row in rows]
    tokens = encoder.tokens_of(rows)
    return [
        _pair(encoder, rows[first : first + ROWS_OF_A_PAIR], tokens[first : first + ROWS_OF_A_PAIR])
        for first in range(0, len(rows), ROWS_OF_A_PAIR)
    ]


def _apart(pair: Row) -> list[Row]:
    assert pair.rejected is not None, "a preference has both"
    return [replace(pair, rejected=None), replace(pair.rejected, id=f"{pair.id}, rejected")]


def _turns(row: Row) -> Row:
    asked = [{"role": "user", "content": row.prompt}] if row.prompt else []
    return replace(row, prompt="", messages=(*asked, {"role": "assistant", "content": row.truths[0].strip()}), answers=1)


def _pair(encoder: RowEncoder, rows: Sequence[Row], tokens: Sequence[Tokens | BadRow]) -> Pair | BadRow:
    for made in tokens:
        if isinstance(made, BadRow):
            return made
    length = encoder.sequence_length
    fitting = fitted(tokens, length)
    if fitting is None:
        text = f"{rows[0].id}: no target is left of both answers in data.sequence_length={length} tokens; raise that"
        return BadRow(Fault.NO_TARGET, text)
    is_cut = fitting is not tokens
    if fitting[0].ids == fitting[1].ids:
        why = f"cut to data.sequence_length={length} for both, " if is_cut else ""
        text = f"{rows[0].id}: {why}chosen and rejected are the same tokens, so neither is preferred"
        return BadRow(Fault.NO_TARGET if is_cut else Fault.VALUE, text)
    pair: Pair = []
    for row, cut in zip(rows, fitting, strict=True):
        made = encoder.shifted(cut, row)
        if isinstance(made, BadRow):
            return made
        pair.append((row, replace(made, is_cut=is_cut)))
    return pair


def fitted(pair: Sequence[Tokens], room: int) -> Sequence[Tokens] | None:
    """Two rows cut so that what the model reads of both takes `room` places; None where a row would have no target left.

    As much is cut off the beginning of both prompts, so that they stay alike; where that is not enough, both answers end at the
    same number of tokens, a shorter one at its own end.
    """
    over = sum(len(tokens.ids) - 1 for tokens in pair) - room
    if over <= 0:
        return pair
    # At least one token stays before the answers, for their first token to be predicted from.
    spare = min(tokens.flags.index(True) - max(tokens.head, 1) for tokens in pair)
    pair = [_without(tokens, min(max(0, spare), -(-over // len(pair)))) for tokens in pair]
    starts = [tokens.flags.index(True) for tokens in pair]
    lengths = [len(tokens.ids) - start for tokens, start in zip(pair, starts, strict=True)]
    left = room - sum(start - 1 for start in starts)
    most = max(left - min(lengths), left // len(pair))
    if most < 1:
        return None
    ends = [start + most for start in starts]
    return [replace(tokens, ids=tokens.ids[:end], flags=tokens.flags[:end]) for tokens, end in zip(pair, ends, strict=True)]


def _without(tokens: Tokens, count: int) -> Tokens:
    """The tokens without the first `count` of the prompt."""
    head, behind = tokens.head, tokens.head + count
    return replace(
        tokens,
        ids=[*tokens.ids[:head], *tokens.ids[behind:]],
        flags=[*tokens.flags[:head], *tokens.flags[behind:]],
        answer=tokens.answer - count,
    )
