"""Encoded preferences to micro-batches: what data_pipeline.row_loader is for rows that are learned as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.loader import MicroBatch
from data_pipeline.preferences import ROWS_OF_A_PAIR
from data_pipeline.row_loader import RowLoader


class PairLoader(RowLoader):
    """Micro-batches whose targets are pairs of rows; with what the reference gives each row, once that is known."""

    references_R: np.ndarray | None = None
    """fp32: log-probability of the targets of every row of the split, by the model that the run began with."""

    @property
    def num_rows(self) -> int:
        """Rows of the split, two of a pair."""
        return len(self._arrays.row_starts_R1) - 1

    def micro_batch(self, sample_ids: Sequence[int]) -> MicroBatch:
        """The samples with these numbers, as one packed batch."""
        made = super().micro_batch(sample_ids)
        rows_D = self.rows_in(sample_ids)
        pairs = int((rows_D >= 0).sum()) // ROWS_OF_A_PAIR
        if self.references_R is None:
            return dataclasses.replace(made, target_tokens=pairs, target_bytes=0)
        references_D = np.zeros(len(made.document_bounds), dtype=np.float32)
        references_D[: len(rows_D)] = np.where(rows_D >= 0, self.references_R[rows_D], 0)
        references = torch.from_numpy(references_D)
        references = references.pin_memory() if self.pin else references
        return dataclasses.replace(made, target_tokens=pairs, target_bytes=0, references=references)

    def rows_in(self, sample_ids: Sequence[int]) -> np.ndarray:
        """The row of every document of a micro-batch, in their order; -1 for padding."""
        found: list[int] = []
        for sample in sample_ids:
            rows, starts_R1 = self._rows_of(sample), self._arrays.row_starts_R1
            found += rows
            if sum(int(starts_R1[row + 1] - starts_R1[row]) for row in rows) < self.sequence_length:
                found.append(-1)
        return np.array(found, dtype=np.int64)
