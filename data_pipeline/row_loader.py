"""Encoded rows to micro-batches: what data_pipeline.loader is for corpora. Rows that share a sequence do not see each other.

Shape letters: B sequences, S places of a sequence, T = B x S, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from conf.errors import UserError
from data_pipeline.encoded_rows import EncodedRows
from data_pipeline.io import sha256_of_texts
from data_pipeline.ledger import sample_hash
from data_pipeline.loader import IGNORE, MicroBatch
from data_pipeline.manifest import Split
from data_pipeline.sampler import Sampler


class RowLoader:
    """Micro-batches by sample number; a sample is a sequence of rows. Holds no position, like Loader.

    Training samples are endless: each sequence once in an epoch, in another order in the next. Validation samples are the
    held-out sequences in the order in which they lie, which is a shuffled one.
    """

    def __init__(
        self, encoded: EncodedRows, *, split: Split, sequence_length: int, seed: int, vocab_size: int, pin: bool = False
    ) -> None:
        """sequence_length: of the run. vocab_size: ids that the model knows. pin: put batches into page-locked memory.

        Raises UserError when the rows are of another length, the split has none, or an id is beyond `vocab_size`.
        """
        if sequence_length != encoded.sequence_length:
            raise UserError(
                f"{encoded.folder}: its sequences have {encoded.sequence_length} tokens, the run's {sequence_length}; remove "
                "it and start again: the rows are then encoded anew"
            )
        if not encoded.num_sequences(split):
            raise UserError(
                f"{encoded.folder}: holds no {split} rows; give task.validation=[{{path: FILE}}] or data.validation_fraction "
                "above 0, or switch evaluation off"
            )
        self.split, self.sequence_length, self.vocab_size, self.pin = split, sequence_length, vocab_size, pin
        self.names = (encoded.task,)
        self.eod_id = encoded.end_of_document
        self.fingerprint = sha256_of_texts([encoded.fingerprint, f"seed={seed}"])
        self.samples_per_epoch = encoded.num_sequences(split)
        self._encoded = encoded
        self._arrays = encoded.arrays(split)
        self._ids: list[str] | None = None
        self._labels_are_tokens = encoded.kind != "classification"
        self._token_bytes_V = encoded.token_bytes()
        self._sampler: Sampler | None = None
        if split == "train":
            self._sampler = Sampler([self.samples_per_epoch], weights=[1.0], names=self.names, seed=seed)
        most = max(int(self._arrays.tokens_N.max()), int(self._arrays.labels_N.max()) * self._labels_are_tokens)
        if most >= vocab_size:
            raise UserError(f"{encoded.folder}: holds token id {most}, the model knows ids below {vocab_size}; encode it anew")

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer that made the tokens."""
        return self._encoded.tokenizer_folder

    @property
    def num_samples(self) -> int:
        """Samples of the validation split. Training has no end: its samples repeat, reshuffled every epoch."""
        if self._sampler is not None:
            raise TypeError("the training samples have no end; num_samples is of the validation split")
        return self.samples_per_epoch

    def held_out_samples(self, most: int | None = None) -> dict[str, range]:
        """Sample numbers to evaluate on; with `most`, the first ones, a fair sample: sequences lie shuffled."""
        return {self.names[0]: range(self.num_samples if most is None else min(most, self.num_samples))}

    def max_bounds(self, batch: int) -> int:
        """Length of `document_bounds` for `batch` samples: fixed for the run, whatever rows a batch holds."""
        return batch * self._encoded.documents_per_sequence + 1

    def source_of(self, sample_id: int) -> str:
        """Name of the task; a sequence may hold rows of all its files."""
        return self.names[0]

    def describe(self, sample_id: int) -> list[str]:
        """Files and lines of the rows in a sample."""
        if self._ids is None:
            self._ids = self._encoded.row_ids(self.split)
        return [self._ids[row] for row in self._rows_of(sample_id)]

    def micro_batch(self, sample_ids: Sequence[int]) -> MicroBatch:
        """The samples with these numbers, as one packed batch."""
        batch, length = len(sample_ids), self.sequence_length
        tokens_BS = np.full((batch, length), self.eod_id, dtype=np.int64)
        labels_BS = np.full((batch, length), IGNORE, dtype=np.int64)
        starts: list[int] = []
        for place, sample in enumerate(sample_ids):
            filled = 0
            for row in self._rows_of(sample):
                first, last = self._arrays.row_starts_R1[row : row + 2].tolist()
                starts.append(place * length + filled)
                end = filled + last - first
                tokens_BS[place, filled:end] = self._arrays.tokens_N[first:last]
                labels_BS[place, filled:end] = self._arrays.labels_N[first:last]
                filled = end
            if filled < length:
                starts.append(place * length + filled)  # the padding is a document of its own
        total = batch * length
        bounds = np.full(self.max_bounds(batch), total, dtype=np.int32)
        bounds[: len(starts)] = starts
        starts_D = np.array(starts, dtype=np.int64)
        positions_T = np.arange(total, dtype=np.int64) - np.repeat(starts_D, np.diff(starts_D, append=total))
        targets = labels_BS[labels_BS != IGNORE]
        made = MicroBatch(
            tokens=torch.from_numpy(tokens_BS.reshape(-1)),
            labels=torch.from_numpy(labels_BS.reshape(-1)),
            positions=torch.from_numpy(positions_T),
            document_bounds=torch.from_numpy(bounds),
            sample_ids=tuple(int(sample) for sample in sample_ids),
            target_tokens=int(targets.size),
            target_bytes=int(self._token_bytes_V[targets].sum(dtype=np.int64)) if self._labels_are_tokens else 0,
            data_hash=sum(map(sample_hash, sample_ids, tokens_BS)) % 2**64,
        )
        return made.pin_memory() if self.pin else made

    def _rows_of(self, sample_id: int) -> list[int]:
        """The rows of a sample, in their order."""
        if self._sampler is not None:
            sequence = int(self._sampler.locate(np.array([sample_id]))[1][0])
        elif 0 <= sample_id < self.samples_per_epoch:
            sequence = sample_id
        else:
            raise IndexError(f"sample {sample_id}: the validation split has samples 0 to {self.samples_per_epoch - 1}")
        return self._arrays.packing.rows_of(sequence).tolist()
