"""The labels of many rows under a model that tells labels apart: in batches of rows of about one length.

Which ranks read what depends on the rows alone, so any number of data-parallel ranks gives the same numbers.

Shapes: B rows, S positions, T = B x S, N labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from conf.errors import UserError
from train.config.model import ModelConfig
from train.inference.likelihood import ROUND_ON_GPU
from train.model.heads import IGNORE
from train.model.transformer import Decoder, Reading
from train.parallel import ParallelContext

Ids: TypeAlias = Sequence[int] | np.ndarray
"""The tokens of one row; an array may be of a file that is mapped into memory."""


class Classifier:
    """Reads rows with a model on this rank's device; all ranks must ask for the same.

    The decoder may be one that trains: it reads by its own kernels, without dropout, and is left as it was. Under ZeRO 3 all
    ranks run equally many batches, as gathering the weights needs.
    """

    def __init__(self, decoder: Decoder, model: ModelConfig, *, context: ParallelContext, batch_tokens: int) -> None:
        """`batch_tokens`: tokens that run together, padding included; one longer row runs alone.

        Raises UserError for a language model.
        """
        if not model.labels:
            raise UserError("model.labels is empty: this is a language model; give one that was trained to tell labels apart")
        self.decoder, self.model, self.context = decoder, model, context
        self.batch_tokens = batch_tokens
        # longrope rotates a row by its own length, so each is kept apart from its padding.
        self._apart = decoder.blocks[0].deriver.rotary.asks_for_lengths
        self._round = ROUND_ON_GPU if context.device.type == "cuda" else 1

    def classify(self, rows: Sequence[Ids], *, progress: Callable[[int], None] = lambda done: None) -> list[list[float]]:
        """Log-probabilities of the model's labels behind the last token of each row, in the rows' order.

        `progress` is told how many more rows are done over all ranks. Raises ValueError for a row without a token, one longer
        than the model reads, and an id that the model does not know; UserError when the scores are not finite.
        """
        self._check(rows)
        self._check_alike(rows)
        found = torch.zeros(len(rows), len(self.model.labels), device=self.context.device)
        ranks, rank = self.context.data_parallel, self.context.data_rank
        batches = self._batches(rows)
        for first in range(0, len(batches), ranks):
            together = batches[first : first + ranks]
            numbers = together[min(rank, len(together) - 1)]
            scores_BN = self._scores([rows[number] for number in numbers])
            if rank < len(together):  # else another rank has them
                found[torch.tensor(numbers, device=found.device)] = scores_BN
            progress(sum(map(len, together)))
        found = self.context.sum_over_data(found)  # each row was read by one rank; the others add zeros
        if not torch.isfinite(found).all():
            raise UserError("the model's scores are not finite: its weights are damaged or it diverged in training")
        return found.tolist()

    def _check(self, rows: Sequence[Ids]) -> None:
        for number, row in enumerate(rows):
            if not len(row):
                raise ValueError(f"row {number}: has no token; its label is told from the last one")
            if len(row) > self.model.max_positions:
                raise ValueError(f"row {number}: {len(row)} tokens, the model reads {self.model.max_positions}; cut its left")
            if np.min(row) < 0 or np.max(row) >= self.model.vocab_size:
                raise ValueError(f"row {number}: holds an id beyond the model's vocabulary of {self.model.vocab_size}")

    def _check_alike(self, rows: Sequence[Ids]) -> None:
        """Ranks that asked for different rows would add up what does not belong together."""
        if self.context.world_size == 1:
            return
        digest = hashlib.blake2b(digest_size=16)
        for row in rows:
            digest.update(len(row).to_bytes(8, "little") + np.asarray(row, dtype=np.int64).tobytes())
        if len(set(self.context.gather_to_all(digest.hexdigest()))) > 1:
            raise RuntimeError("the ranks ask for the labels of different rows")

    def _batches(self, rows: Sequence[Ids]) -> list[list[int]]:
        """Numbers of the rows that run together, the longest first: what does not fit into memory is found at once."""
        batches: list[list[int]] = []
        for number in sorted(range(len(rows)), key=lambda number: -len(rows[number])):
            if not batches or (len(batches[-1]) + 1) * len(rows[batches[-1][0]]) > self.batch_tokens:
                batches.append([])
            batches[-1].append(number)
        return batches

    @torch.no_grad()
    def _scores(self, rows: Sequence[Ids]) -> Tensor:
        """Log-probabilities [B, N] behind some rows, by the kernels of training."""
        decoder, device = self.decoder, self.context.device
        lengths_B = torch.tensor([len(row) for row in rows])
        length = self._padded_length(int(lengths_B.max()))
        tokens_BS = pad_sequence([torch.from_numpy(np.array(row, dtype=np.int64)) for row in rows], batch_first=True)
        tokens_T = pad(tokens_BS, (0, length - tokens_BS.shape[1])).flatten()
        positions_T = torch.arange(length).clamp(max=self.model.max_positions - 1).repeat(len(rows))
        starts_B = torch.arange(len(rows)) * length
        ends_B = starts_B + lengths_B
        bounds = torch.stack((starts_B, ends_B), dim=1).flatten() if self._apart else starts_B
        bounds = torch.cat((bounds, torch.tensor([len(tokens_T)]))).int()
        places_B = (ends_B - 1).to(device)
        ignored_T = torch.full_like(tokens_T, IGNORE)
        state = [tensor.to(device) for tensor in (tokens_T, ignored_T, positions_T, bounds)]

        reading, training, seen = decoder.reading, decoder.training, []
        # A whole forward pass, with the scores taken on the way: under ZeRO 3 it must have all modules in their order.
        hook = decoder.layers[-1].register_forward_pre_hook(
            lambda head, inputs: seen.append(head.scores(inputs[0][0], places_B))
        )
        decoder.read_as(Reading(sequence_length=length, document_mask=self._apart))
        decoder.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # of lengths that are seen once
                decoder(*state)
        finally:
            hook.remove()
            decoder.train(training)
            decoder.read_as(reading)
        return seen[0]

    def _padded_length(self, longest: int) -> int:
        length = min(-(-longest // self._round) * self._round, max(longest, self.model.max_positions))
        tensor = self.decoder.layers[-1].tensor
        parts = tensor.size if tensor.sequence_parallel else 1  # between which the rows' tokens are cut
        return -(-length // parts) * parts
