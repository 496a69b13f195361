"""One split of a prepared corpus as one long run of tokens, whatever its shards.

The only reader of megatron-core's IndexedDataset.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from conf.errors import UserError
from data_pipeline.io import read_json_lines
from data_pipeline.manifest import MANIFEST_FILE, TOKEN_BYTES_FILE, Manifest, Split, read_manifest, remedy


class Corpus:
    """The tokens of one split, by position."""

    def __init__(self, folder: str | Path, split: Split, *, manifest: Manifest | None = None) -> None:
        """Open the shards of `split`, memory-mapped. `manifest` saves reading it again.

        Raises UserError when the corpus is missing or damaged.
        """
        # Imported here: megatron-core takes seconds, and whoever only reads a manifest shall not wait for it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on optional packages that reading shards has no use for
            from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.manifest = manifest if manifest is not None else read_manifest(folder)
        self.folder, self.split = Path(folder), split
        self.eod_id, self.vocab_size = self.manifest.eod_id, self.manifest.vocab_size
        self.fingerprint = self.manifest.fingerprint
        self._shards = self.manifest.shards_of(split)
        self._datasets = []
        for shard in self._shards:
            try:
                dataset = IndexedDataset(str(self.folder / shard.stem))
                sound = np.dtype(dataset.index.dtype) == self.manifest.dtype and len(dataset) == shard.num_documents
            except (AssertionError, ValueError, KeyError):  # what its reader raises on a foreign or cut header
                sound = False
            if not sound:
                missing = [file.name for file in shard.files if not (self.folder / file.name).exists()]
                if missing:  # the manifest may have been read on another machine
                    where = f"{self.folder / missing[0]}: is not there on {os.uname().nodename}"
                    raise UserError(
                        f"{where}, though {MANIFEST_FILE} lists it: check that the folder is the same on every node"
                    )
                raise UserError(f"{self.folder / shard.stem}.idx: damaged, it does not fit the manifest. {remedy(self.folder)}")
            self._datasets.append(dataset)
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in self._shards)], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of the split."""
        return int(self._starts[-1])

    def windows(self, sequence_length: int) -> int:
        """Complete samples of so many tokens; each needs one token more, its last label, shared with the next sample."""
        return max(0, (self.num_tokens - 1) // sequence_length)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count), in the shards' own type; a view into the mapped file where one shard has them all."""
        if not 0 <= start <= start + count <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {self.folder}: {self.split} holds {self.num_tokens}")
        pieces = []
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while count > 0:
            offset = start - int(self._starts[number])
            taken = min(count, int(self._starts[number + 1]) - start)
            # Document 0 begins the file, so a read from it by offset passes over the borders of documents.
            pieces.append(self._datasets[number].get(0, offset=offset, length=taken))
            start, count, number = start + taken, count - taken, number + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=self.manifest.dtype)

    def documents(self) -> Iterator[tuple[str, np.ndarray]]:
        """Id and tokens of each document, end mark included, in the shards' own type; views into the mapped files."""
        for shard, dataset in zip(self._shards, self._datasets, strict=True):
            ids = read_json_lines(self.folder / f"{shard.stem}.ids.jsonl")
            for number, name in enumerate(ids):
                yield name, dataset.get(number)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of every id, int32 [vocab_size]; special tokens have none."""
        return np.load(self.folder / TOKEN_BYTES_FILE, allow_pickle=False).astype(np.int32)

    def shard_at(self, position: int) -> str:
        """Name of the shard that holds the token at `position`."""
        return self._shards[int(np.searchsorted(self._starts, position, side="right")) - 1].stem

    def documents_between(self, start: int, count: int) -> list[str]:
        """Ids of the documents that tokens [start, start + count) belong to: where a sample came from."""
        found: list[str] = []
        for number, dataset in enumerate(self._datasets):
            first, last = max(start, int(self._starts[number])), min(start + count, int(self._starts[number + 1]))
            if first >= last:
                continue
            ends = np.cumsum(dataset.index.sequence_lengths, dtype=np.int64) + self._starts[number]
            begin, end = np.searchsorted(ends, [first, last - 1], side="right")
            ids = read_json_lines(self.folder / f"{self._shards[number].stem}.ids.jsonl")
            found += [name for place, name in enumerate(ids) if begin <= place <= end]
        return found
