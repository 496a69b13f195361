"""The check of a model that tells labels apart: rows of several lengths, as users of its class would give them.

Shapes: B rows, S positions, N labels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_pipeline.loader import IGNORE
from data_pipeline.tokenizer import Tokenizer
from train.config.model import ModelConfig
from train.convert.proof.finding import Figures, Finding
from train.convert.proof.ours import OurModel
from train.convert.proof.outputs import Comparison
from train.convert.proof.rows import Rows, pack, positions_at_once
from train.convert.proof.theirs import TheirModel
from train.inference.special import special_id

SHARES = (1.0, 0.6, 0.35, 0.2, 0.0)
"""Lengths of the rows, of the longest; the last one is of a single token."""
MAX_LENGTH = 128


def prove_rows(ours: OurModel, theirs: TheirModel, model: ModelConfig, *, tokenizer_folder: Path, is_foreign: bool) -> Finding:
    """Scores of the labels of random rows: each alone, some of them with the end token last; and filled up to one length.

    The class finds the last token of a row by an id of padding, so a row that ends in that id is read too early.
    `is_foreign`: the folder is one of others, in which the end token may be that id; rows do not end in it then.
    """
    pad: int | None = theirs.module.config.pad_token_id
    end = special_id(Tokenizer(tokenizer_folder), "eos_token")
    if end is not None and (end >= model.vocab_size or (is_foreign and end == pad)):
        end = None
    rows = _random_rows(model, end=end, pad=pad)
    expected_BN = _scores(ours, rows, model)
    alone_BN = torch.cat([theirs.label_logits(row[None], torch.tensor([len(row)])) for row in rows])
    problems, found = [], Comparison()
    found.add(expected_BN, alone_BN)
    worst = found.worst
    if not worst <= found.allowed:
        problems.append(f"scores of rows alone differ by up to {worst:.3g}, allowed is {found.allowed:.3g}{_way_out(end, pad)}")
    # With longrope transformers takes the frequencies of the longest row for all.
    together = pad is not None and not (model.positions == "rotary" and model.rope.scaling == "longrope")
    if together:
        padded_BS = pad_sequence(rows, batch_first=True, padding_value=pad)
        padded = Comparison()
        padded.add(expected_BN, theirs.label_logits(padded_BS, torch.tensor([len(row) for row in rows])))
        worst = max(worst, padded.worst)
        if not padded.worst <= padded.allowed:
            problems.append(f"scores of rows filled up with id {pad} differ by up to {padded.worst:.3g}")
    figures: Figures = {
        "rows": len(rows),
        "labels": len(model.labels),
        "max_abs_difference": worst,
        "tolerance": found.allowed,
        "filled_up": "yes" if together else "no",
        "end_token_last": "no" if end is None else "yes",
    }
    return Finding(name="rows", figures=figures, problems=tuple(problems))


def _way_out(end: int | None, pad: int | None) -> str:
    if pad is None or pad != end:
        return ""
    return f"; rows are filled up with id {pad}, the end token, and one that ends in it is read a token early"


def _random_rows(model: ModelConfig, *, end: int | None, pad: int | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    longest = min(model.max_positions, MAX_LENGTH)
    rows = []
    for number, share in enumerate(SHARES):
        row = torch.randint(model.vocab_size, (max(1, int(share * longest)),), generator=generator)
        if number % 2 and end is not None:
            row[-1] = end
        elif int(row[-1]) == pad:  # no row of text ends in what is no text
            row[-1] = (pad + 1) % model.vocab_size
        rows.append(row)
    return rows


def _scores(ours: OurModel, rows: list[Tensor], model: ModelConfig) -> Tensor:
    """[B, N] behind the last token of each row, padding behind the shorter ones."""
    lengths = [len(row) for row in rows]
    assert lengths == sorted(lengths, reverse=True), "packing keeps the order of rows that become shorter"
    documents = [(row, torch.arange(len(row)), torch.full_like(row, IGNORE)) for row in rows]
    last: list[Tensor] = []
    for group in pack(documents, positions_at_once(model)):
        last += _last_hidden(ours, group, lengths[len(last) :])
    return torch.cat(list(ours.logits(torch.stack(last))))


def _last_hidden(ours: OurModel, group: Rows, lengths: list[int]) -> list[Tensor]:
    (hidden_TH,) = ours.hidden([group.state], group.reading)
    hidden_BSH = hidden_TH.view(*group.tokens.shape, -1)
    return [hidden_SH[length - 1] for hidden_SH, length in zip(hidden_BSH, lengths, strict=False)]
