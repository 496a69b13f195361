"""Deduplication, and shards against megatron-core's own reader and writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.dedup import choose_held_out, content_hash, first_occurrences, hash_array
from data_pipeline.document import Document
from data_pipeline.encode import PartWriter, index_bytes, token_format, write_shards
from data_pipeline.manifest import Manifest
from tests.unit.data_pipeline.corpora import some_texts

EOD = 1


class FakeEngine:
    """Gives each text the ids it names."""

    def encode(self, texts_D: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [np.array([int(word) for word in text.split()], dtype=np.int64) for text in texts_D]
        return np.concatenate(ids), np.array([len(part) for part in ids])


def write_part(prefix: Path, texts: list[str], vocab_size: int = 100) -> None:
    with PartWriter(prefix, FakeEngine(), token_format(vocab_size, EOD)) as writer:
        for number, text in enumerate(texts):
            writer.add(Document(id=f"{prefix.name}/{number}", source="s", text=text))


class TestHashes:
    def test_first_one_wins(self) -> None:
        texts = [b"a", b"b", b"a", b"c", b"b", b"a", b""]
        found = first_occurrences(hash_array([content_hash(text) for text in texts]))
        assert found.tolist() == [0, 1, 0, 3, 1, 0, 6]

    def test_against_a_dictionary(self) -> None:
        rng = np.random.default_rng(0)
        hashes = rng.integers(0, 12, size=(3000, 2)).astype(np.uint64)
        first: dict[tuple[int, ...], int] = {}
        expected = [first.setdefault(tuple(row), number) for number, row in enumerate(hashes.tolist())]
        assert first_occurrences(hashes).tolist() == expected

    def test_no_documents(self) -> None:
        empty = hash_array([])
        assert first_occurrences(empty).size == 0 and choose_held_out(empty, 0.5, seed=0).size == 0

    def test_share_and_independence_of_held_out(self) -> None:
        hashes = hash_array([content_hash(str(number).encode()) for number in range(20_000)])
        chosen = choose_held_out(hashes, 0.05, seed=0)
        assert 0.04 < chosen.mean() < 0.06
        assert np.array_equal(choose_held_out(hashes[::-1], 0.05, seed=0)[::-1], chosen)
        assert np.array_equal(choose_held_out(hashes[:500], 0.05, seed=0), chosen[:500])
        assert 0.03 < choose_held_out(hashes, 0.05, seed=1)[chosen].mean() < 0.09
        assert not choose_held_out(hashes, 0.0, seed=0).any()

    def test_at_least_one_of_few(self) -> None:
        hashes = hash_array([content_hash(text) for text in (b"a", b"b", b"c")])
        assert choose_held_out(hashes, 1e-9, seed=0).sum() == 1
        assert choose_held_out(hashes[:1], 1e-9, seed=0).sum() == 0


class TestShards:
    def test_megatron_reads_the_same(self, tiny: Manifest) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        for shard in tiny.shards:
            theirs = IndexedDataset(str(tiny.folder / shard.stem))
            tokens = np.fromfile(tiny.folder / f"{shard.stem}.bin", dtype=tiny.dtype)
            ends = np.flatnonzero(tokens == tiny.eod_id) + 1
            assert len(theirs) == len(ends) == shard.num_documents and len(tokens) == shard.num_tokens
            assert theirs.document_indices.tolist() == list(range(len(ends) + 1))
            for number, document in enumerate(np.split(tokens, ends[:-1])):
                assert np.array_equal(theirs[number], document)

    @pytest.mark.parametrize("dtype", ["uint16", "int32"])
    def test_index_equals_the_one_megatron_writes(self, tmp_path: Path, dtype: str) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        lengths = [3, 1, 700, 2]
        builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
        for length in lengths:
            import torch

            builder.add_item(torch.arange(length))
            builder.end_document()
        builder.finalize(str(tmp_path / "theirs.idx"))
        assert index_bytes(np.array(lengths), dtype) == (tmp_path / "theirs.idx").read_bytes()

    def test_parts_become_shards_cut_between_documents(self, tmp_path: Path) -> None:
        write_part(tmp_path / "p0", ["2 3 4", "5"])
        write_part(tmp_path / "p1", [])
        write_part(tmp_path / "p2", ["6 7 8 9 10 11 12 13", "14 15", "16"])
        form = token_format(100, EOD)
        prefixes = [tmp_path / name for name in ("p0", "p1", "p2")]
        seen: list[int] = []
        shards, tokens_N = write_shards(prefixes, tmp_path, split="train", form=form, shard_tokens=6, progress=seen.append)
        content = [np.fromfile(tmp_path / f"{shard.stem}.bin", dtype="uint16").tolist() for shard in shards]
        assert content == [[2, 3, 4, 1, 5, 1], [6, 7, 8, 9, 10, 11, 12, 13, 1], [14, 15, 1, 16, 1]]
        assert tokens_N.tolist() == [4, 2, 9, 3, 2] and sum(seen) == 2 * 20
        assert [shard.max_token_id for shard in shards] == [5, 13, 16]
        assert [shard.text_bytes for shard in shards] == [6, 19, 7]
        assert (tmp_path / "train-00002.ids.jsonl").read_text() == '"p2/1"\n"p2/2"\n'

    def test_a_split_without_documents(self, tmp_path: Path) -> None:
        write_part(tmp_path / "p0", [])
        shards, tokens_N = write_shards(
            [tmp_path / "p0"], tmp_path, split="train", form=token_format(9, EOD), shard_tokens=6, progress=lambda count: None
        )
        assert shards == () and tokens_N.size == 0

    def test_type_follows_the_vocabulary(self) -> None:
        assert token_format(65_536, EOD).dtype == "uint16" and token_format(65_537, EOD).dtype == "int32"

    def test_large_ids_survive(self, tmp_path: Path) -> None:
        write_part(tmp_path / "p0", ["70000 65535"], vocab_size=70_001)
        assert np.fromfile(tmp_path / "p0.bin", dtype="int32").tolist() == [70_000, 65_535, EOD]

    def test_id_beyond_the_vocabulary_is_not_cast(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="gives id 70000, beyond its own vocabulary of 65536"):
            write_part(tmp_path / "p0", ["70000"], vocab_size=65_536)
        assert not list(tmp_path.iterdir())  # nothing half-written stays


def test_texts_of_the_helper_differ() -> None:
    assert len(set(some_texts(300))) == 300
