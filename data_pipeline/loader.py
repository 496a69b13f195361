"""Samples to micro-batches. With row_loader and pair_loader the only module of this package that uses torch.

Everything about documents is worked out here, on the CPU with numpy: positions, bounds and labels come from the places of
end-of-document, so that no model block has to look at token ids.

Shape letters: B samples, S tokens of a sample, T = B x S, batch-major.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from conf.errors import UserError
from data_pipeline.config import DataConfig, quotas
from data_pipeline.corpus import Corpus
from data_pipeline.facts import documents_per_sample, fingerprint_of, read_sources, train_windows, validation_windows
from data_pipeline.ledger import sample_hash
from data_pipeline.manifest import Manifest, Split
from data_pipeline.sampler import Sampler

IGNORE = -100  # label of a position that is no target: what torch's cross_entropy ignores unless told otherwise


@dataclass(frozen=True)
class MicroBatch:
    """B samples, packed into one row of T tokens."""

    tokens: torch.Tensor
    """int64 [T]."""
    labels: torch.Tensor
    """int64 [T]: the next token; IGNORE behind end-of-document (with a document mask) and in padding."""
    positions: torch.Tensor
    """int64 [T]: counts from 0 in every document (with a document mask) or every sample."""
    document_bounds: torch.Tensor
    """int32 [max_bounds]: where each document or sample begins in T: 0, ..., T, filled up with T."""
    sample_ids: tuple[int, ...]
    """The samples, B of them."""
    target_tokens: int
    """Labels that are not IGNORE; of preferences the pairs, which are what counts as one there."""
    target_bytes: int
    """UTF-8 bytes of those labels' text: the denominator of bits per byte."""
    data_hash: int
    """Sum of the samples' hashes (see `data_pipeline.ledger`), modulo 2**64."""
    references: torch.Tensor | None = None
    """Of preferences, fp32 [max_bounds]: log-probability of the targets of the document that begins at a bound, by the model
    that the run began with; 0 where none has targets."""

    def pin_memory(self) -> MicroBatch:
        """The same batch in page-locked memory, from where a GPU copies without making the CPU wait."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        pinned = {name: value.pin_memory() for name, value in found.items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **pinned)


class SampleSource(Protocol):
    """Training samples by their numbers; it holds no position."""

    def micro_batch(self, sample_ids: Sequence[int]) -> MicroBatch:
        """The samples with these numbers, as one packed batch."""

    def source_of(self, sample_id: int) -> str:
        """Name of the source that a sample comes from."""

    def describe(self, sample_id: int) -> list[str]:
        """What is in a sample, for a person."""


class Loader:
    """Micro-batches by sample number; holds no position, so every rank and every restart asks for what it needs.

    Training samples are endless and follow the Sampler. Validation samples are the held-out text in order, source after source:
    every token that has a token before it (in its document, with a document mask) is a target exactly once.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: Split,
        seed: int,
        vocab_size: int,
        pin: bool = False,
        manifests: tuple[Manifest, ...] | None = None,
    ) -> None:
        """vocab_size: ids that the model knows. pin: put batches into page-locked memory. manifests: of the sources, where they
        have been read.

        Raises UserError when a source is missing, damaged or too short, the tokenizers differ, or an id is beyond `vocab_size`.
        """
        self.split, self.sequence_length, self.document_mask = split, config.sequence_length, config.document_mask
        self.vocab_size, self.pin = vocab_size, pin
        manifests = manifests or read_sources(config)
        self.names = tuple(source.label for source in config.sources)
        self.eod_id = manifests[0].eod_id
        self.fingerprint = fingerprint_of(config, manifests, seed=seed)
        self._documents_per_sample = documents_per_sample(config, manifests)
        self._manifests = manifests
        self._check_vocabulary()
        self._corpora = tuple(Corpus(manifest.folder, split, manifest=manifest) for manifest in manifests)
        self._token_bytes_V = self._corpora[0].token_bytes()
        self._sampler: Sampler | None = None
        if split == "train":
            windows = [train_windows(manifest, self.sequence_length) for manifest in manifests]
            weights = [source.weight for source in config.sources]
            self._sampler = Sampler(windows, weights=weights, names=self.names, seed=seed)
        else:
            windows = [validation_windows(manifest, self.sequence_length) for manifest in manifests]
            if not sum(windows):
                folders = ", ".join(str(manifest.folder) for manifest in manifests)
                raise UserError(
                    f"{folders}: no held-out text to evaluate on; prepare with held_out_fraction above 0 and more documents, "
                    "or switch evaluation off"
                )
        self._first_sample = np.cumsum([0, *windows], dtype=np.int64)

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer that made the tokens."""
        return self._manifests[0].tokenizer_path

    @property
    def num_samples(self) -> int:
        """Samples of the validation split. Training has no end: its samples repeat, reshuffled every epoch."""
        if self._sampler is not None:
            raise TypeError("the training samples have no end; num_samples is of the validation split")
        return int(self._first_sample[-1])

    def held_out_samples(self, most: int | None = None) -> dict[str, range]:
        """Sample numbers to evaluate on, by source; a source without held-out text is left out.

        With `most`, the first ones of every source, in proportion to what it has, but at least one of each.
        """
        assert self._sampler is None, "the training split holds nothing out"
        windows = np.diff(self._first_sample).tolist()
        if most is not None and most < self.num_samples:
            shares = list(quotas(windows, most))
            for index in [index for index, share in enumerate(shares) if share == 0 < windows[index]]:
                largest = max(range(len(shares)), key=shares.__getitem__)
                shares[largest] -= shares[largest] > 1
                shares[index] = 1
            windows = shares
        firsts = self._first_sample[:-1].tolist()
        return {
            name: range(first, first + number)
            for name, first, number in zip(self.names, firsts, windows, strict=True)
            if number
        }

    def max_bounds(self, batch: int) -> int:
        """Length of `document_bounds` for `batch` samples: fixed for the run, whatever documents a batch holds."""
        return batch * self._documents_per_sample + 1

    def source_of(self, sample_id: int) -> str:
        """Name of the source that a sample comes from."""
        return self.names[int(self._locate([sample_id])[0][0])]

    def describe(self, sample_id: int) -> list[str]:
        """Ids of the documents in a sample, for finding out what made a loss jump."""
        source, window = (int(part[0]) for part in self._locate([sample_id]))
        corpus = self._corpora[source]
        start = window * self.sequence_length
        return corpus.documents_between(start, min(self.sequence_length, corpus.num_tokens - start))

    def micro_batch(self, sample_ids: Sequence[int]) -> MicroBatch:
        """The samples with these numbers, as one packed batch.

        Raises UserError for a token id that the model does not know, or more documents than the manifest promised.
        """
        source_B, window_B = self._locate(sample_ids)
        batch, length = len(sample_ids), self.sequence_length
        tokens_BS1 = np.full((batch, length + 1), self.eod_id, dtype=np.int64)
        real_B = np.empty(batch, dtype=np.int64)
        for row, (source, window) in enumerate(zip(source_B.tolist(), window_B.tolist(), strict=True)):
            corpus, start = self._corpora[source], window * length
            real_B[row] = min(length + 1, corpus.num_tokens - start)
            tokens_BS1[row, : real_B[row]] = corpus.read(start, int(real_B[row]))
        if tokens_BS1.max() >= self.vocab_size:
            self._refuse_id(tokens_BS1, source_B, window_B)

        inputs_BS, labels_BS = tokens_BS1[:, :-1], tokens_BS1[:, 1:].copy()
        begins_BS = self._document_begins(inputs_BS, real_B)
        if self.document_mask:
            labels_BS[inputs_BS == self.eod_id] = IGNORE
        for row in np.flatnonzero(real_B <= length):
            labels_BS[row, real_B[row] - 1 :] = IGNORE
        targets = labels_BS[labels_BS != IGNORE]
        positions_T, bounds = self._positions_and_bounds(begins_BS, sample_ids, source_B)
        made = MicroBatch(
            tokens=torch.from_numpy(np.ascontiguousarray(inputs_BS).reshape(-1)),
            labels=torch.from_numpy(labels_BS.reshape(-1)),
            positions=torch.from_numpy(positions_T),
            document_bounds=torch.from_numpy(bounds),
            sample_ids=tuple(int(sample) for sample in sample_ids),
            target_tokens=int(targets.size),
            target_bytes=int(self._token_bytes_V[targets].sum(dtype=np.int64)),
            data_hash=sum(map(sample_hash, sample_ids, inputs_BS)) % 2**64,
        )
        return made.pin_memory() if self.pin else made

    def _locate(self, sample_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Source and window of every sample."""
        samples_B = np.asarray(sample_ids, dtype=np.int64)
        if self._sampler is not None:
            source_B, window_B, _ = self._sampler.locate(samples_B)
            return source_B, window_B
        if samples_B.size and not 0 <= samples_B.min() <= samples_B.max() < self.num_samples:
            raise IndexError(f"sample {samples_B.max()}: the validation split has samples 0 to {self.num_samples - 1}")
        source_B = np.searchsorted(self._first_sample, samples_B, side="right") - 1
        return source_B, samples_B - self._first_sample[source_B]

    def _document_begins(self, inputs_BS: np.ndarray, real_B: np.ndarray) -> np.ndarray:
        """True where a document begins; all padding of a sample is one document of its own."""
        begins_BS = np.zeros(inputs_BS.shape, dtype=bool)
        if self.document_mask:
            begins_BS[:, 1:] = inputs_BS[:, :-1] == self.eod_id
            for row in np.flatnonzero(real_B < self.sequence_length):
                begins_BS[row, real_B[row] :] = False
                begins_BS[row, real_B[row]] = True
        begins_BS[:, 0] = True
        return begins_BS

    def _positions_and_bounds(
        self, begins_BS: np.ndarray, sample_ids: Sequence[int], source_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions int64 [T] and bounds int32 [max_bounds] from where documents begin."""
        total = begins_BS.size
        starts = np.flatnonzero(begins_BS)
        bounds = np.full(self.max_bounds(len(sample_ids)), total, dtype=np.int32)
        if len(starts) >= len(bounds):
            paths = sorted({str(self._manifests[source].path) for source in source_B})
            raise UserError(
                f"{', '.join(paths)}: samples {list(sample_ids)} hold {len(starts)} documents, `densest` allows "
                f"{len(bounds) - 1}; the shards do not fit their manifest: prepare the corpus again"
            )
        bounds[: len(starts)] = starts
        lengths = np.diff(starts, append=total)
        return np.arange(total, dtype=np.int64) - np.repeat(starts, lengths), bounds

    def _check_vocabulary(self) -> None:
        for manifest in self._manifests:
            for shard in manifest.shards_of(self.split):
                if shard.max_token_id >= self.vocab_size:
                    raise UserError(self._unknown_id(shard.max_token_id, f"{manifest.folder / shard.stem}.bin"))

    def _refuse_id(self, tokens_BS1: np.ndarray, source_B: np.ndarray, window_B: np.ndarray) -> None:
        """Say where the id beyond the vocabulary is. It is not what the manifest says, so the shard has changed since."""
        row, column = (int(index) for index in np.argwhere(tokens_BS1 >= self.vocab_size)[0])
        corpus = self._corpora[int(source_B[row])]
        position = int(window_B[row]) * self.sequence_length + column
        where = f"{corpus.folder / corpus.shard_at(position)}.bin, token {position} of {self.split}"
        raise UserError(self._unknown_id(int(tokens_BS1[row, column]), where))

    def _unknown_id(self, token_id: int, where: str) -> str:
        known = self._manifests[0].vocab_size
        if token_id < known:
            way_out = f"give model.vocab_size={known}, the tokenizer's, or null"
        else:
            way_out = f"the tokenizer has {known} ids, so the shard is damaged: data.verify=full tells what has changed"
        return f"{where}: token id {token_id} is beyond model.vocab_size={self.vocab_size}; {way_out}"
