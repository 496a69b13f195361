"""Sequences of one length that both models read, and how many of them at a time.

Shapes: B sequences, S positions, T = B x S tokens batch-major, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_pipeline.loader import IGNORE
from train.config.model import ModelConfig
from train.model.transformer import Reading, State

ACTIVATION_BYTES = 1 << 25
"""Of the widest activation of the positions that run through a model together."""
LEAST_POSITIONS, MOST_POSITIONS = 512, 1 << 14
"""With fewer, reading the weights takes longer than computing with them."""
LOGIT_BYTES = 1 << 24
"""Of the logits that exist together."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """B sequences, each one document; int64 [B, S] each."""

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    """IGNORE where there is no target, and in the padding behind a shorter sequence, which no position before it sees."""

    @property
    def state(self) -> State:
        """The micro-batch that our layers take."""
        num_rows, length = self.tokens.shape
        bounds = torch.arange(0, (num_rows + 1) * length, length, dtype=torch.int32)
        return self.tokens.flatten(), self.labels.flatten(), self.positions.flatten(), bounds

    @property
    def reading(self) -> Reading:
        """How our layers are to read it."""
        return Reading(sequence_length=self.tokens.shape[1], document_mask=False)

    def split(self, rows: int) -> Iterator[Rows]:
        """The same sequences, at most `rows` of them at a time."""
        parts = zip(self.tokens.split(rows), self.positions.split(rows), self.labels.split(rows), strict=True)
        for tokens_BS, positions_BS, labels_BS in parts:
            yield Rows(tokens=tokens_BS, positions=positions_BS, labels=labels_BS)


def positions_at_once(model: ModelConfig) -> int:
    """Positions that run through a model together, so that activations stay small beside a layer's weights.

    One sequence where the rotary frequencies follow from its length: transformers takes those of the longest for all.
    """
    if model.positions == "rotary" and model.rope.scaling == "longrope":
        return 1
    widest = max(2 * model.ffn_size, (model.num_heads + 2 * model.kv_heads) * model.head_dim, model.hidden_size)
    return max(LEAST_POSITIONS, min(MOST_POSITIONS, ACTIVATION_BYTES // (4 * widest)))


def logits_at_once(model: ModelConfig) -> int:
    """Positions whose logits exist together."""
    return max(1, LOGIT_BYTES // (4 * model.padded_vocab_size))


def pack(documents: Sequence[tuple[Tensor, Tensor, Tensor]], most: int) -> Iterator[Rows]:
    """(tokens, positions, labels) [S] of documents of any length as rows, filled up, of at most `most` positions."""
    group: list[tuple[Tensor, Tensor, Tensor]] = []
    for document in sorted(documents, key=lambda document: -len(document[0])):  # the first of a group is its longest
        if group and (len(group) + 1) * len(group[0][0]) > most:
            yield _filled_up(group)
            group = []
        group.append(document)
    if group:
        yield _filled_up(group)


def _filled_up(group: list[tuple[Tensor, Tensor, Tensor]]) -> Rows:
    tokens, labels = [document[0] for document in group], [document[2] for document in group]
    first_B1 = torch.stack([document[1][:1] for document in group])
    return Rows(
        tokens=pad_sequence(tokens, batch_first=True),
        positions=first_B1 + torch.arange(len(tokens[0])),
        labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    )
