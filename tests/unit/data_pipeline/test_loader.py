"""Batches against a reference that walks the token stream one token at a time."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from data_pipeline.corpus import Corpus
from data_pipeline.loader import IGNORE, Loader, MicroBatch
from data_pipeline.manifest import MANIFEST_FILE, Manifest, read_manifest
from data_pipeline.prefetcher import Prefetcher
from data_pipeline.sampler import Sampler
from tests.unit.data_pipeline.corpora import prepared, some_texts


def data(*manifests: Manifest, **changes: object) -> DataConfig:
    sources = tuple(SourceConfig(path=str(manifest.folder), name=f"s{i}") for i, manifest in enumerate(manifests))
    return DataConfig(sources=sources, **{"sequence_length": 48, **changes})  # type: ignore[arg-type]


def stream_of(manifest: Manifest, split: str) -> list[int]:
    """The tokens of a split, straight from the .bin files."""
    shards = [np.fromfile(manifest.folder / f"{s.stem}.bin", dtype=manifest.dtype) for s in manifest.shards if s.split == split]
    return np.concatenate(shards).tolist()


def reference(stream: list[int], start: int, length: int, eod: int, mask: bool) -> dict[str, list[int]]:
    """One sample, token by token."""
    tokens, labels, positions, starts = [], [], [], []
    position = 0
    for offset in range(length):
        place = start + offset
        padding = place >= len(stream)
        token = eod if padding else stream[place]
        last = place + 1 >= len(stream)
        before_is_eod = offset > 0 and not padding and stream[place - 1] == eod
        first_padding = padding and place == len(stream)
        if offset == 0 or (mask and (before_is_eod or first_padding)):
            starts.append(offset)
            position = 0
        tokens.append(token)
        labels.append(IGNORE if last or (mask and token == eod) else stream[place + 1])
        positions.append(position)
        position += 1
    return {"tokens": tokens, "labels": labels, "positions": positions, "starts": starts}


def check(batch: MicroBatch, samples: list[dict[str, list[int]]], length: int, bytes_of: np.ndarray, max_bounds: int) -> None:
    for name in ("tokens", "labels", "positions"):
        expected = [value for sample in samples for value in sample[name]]
        assert getattr(batch, name).tolist() == expected, name
    starts = [row * length + start for row, sample in enumerate(samples) for start in sample["starts"]]
    total = len(samples) * length
    assert batch.document_bounds.tolist() == starts + [total] * (max_bounds - len(starts))
    targets = [label for sample in samples for label in sample["labels"] if label != IGNORE]
    assert batch.target_tokens == len(targets)
    assert batch.target_bytes == sum(int(bytes_of[label]) for label in targets)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("length", [1, 7, 64, 100])
def test_training_batches_equal_the_reference(tiny: Manifest, tiny_second: Manifest, mask: bool, length: int) -> None:
    config = data(tiny, tiny_second, sequence_length=length, document_mask=mask)
    loader = Loader(config, split="train", seed=5, vocab_size=tiny.vocab_size)
    streams = [stream_of(manifest, "train") for manifest in (tiny, tiny_second)]
    windows = [(len(stream) - 1) // length for stream in streams]
    sampler = Sampler(windows, weights=[1, 1], names=["s0", "s1"], seed=5)
    bytes_of = np.load(tiny.folder / "token_bytes.npy")
    for first in (0, 9_996, 10**9):
        ids = list(range(first, first + 8))
        source, window, _ = sampler.locate(np.array(ids))
        samples = [
            reference(streams[s], w * length, length, tiny.eod_id, mask)
            for s, w in zip(source.tolist(), window.tolist(), strict=True)
        ]
        batch = loader.micro_batch(ids)
        check(batch, samples, length, bytes_of, loader.max_bounds(8))
        assert batch.sample_ids == tuple(ids)
        assert [loader.source_of(i) for i in ids] == [f"s{s}" for s in source]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("length", [7, 64])
def test_validation_covers_every_token_once(tiny: Manifest, tiny_second: Manifest, mask: bool, length: int) -> None:
    config = data(tiny, tiny_second, sequence_length=length, document_mask=mask)
    loader = Loader(config, split="validation", seed=0, vocab_size=tiny.vocab_size)
    bytes_of = np.load(tiny.folder / "token_bytes.npy")
    sample = 0
    for name, manifest in (("s0", tiny), ("s1", tiny_second)):
        stream = stream_of(manifest, "validation")
        targets: list[int] = []
        for window in range(-(-(len(stream) - 1) // length)):
            assert loader.source_of(sample) == name
            batch = loader.micro_batch([sample])
            expected = reference(stream, window * length, length, manifest.eod_id, mask)
            check(batch, [expected], length, bytes_of, loader.max_bounds(1))
            targets += [label for label in batch.labels.tolist() if label != IGNORE]
            sample += 1
        pairs = zip(stream[:-1], stream[1:], strict=True)
        assert targets == [after for before, after in pairs if not (mask and before == manifest.eod_id)]
    assert sample == loader.num_samples
    with pytest.raises(IndexError, match="samples 0 to"):
        loader.micro_batch([sample])


@pytest.fixture(scope="module")
def three(tiny: Manifest, tiny_second: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """Held-out samples of two sources; the one between them has none."""
    tokenizer = TokenizerConfig(path=str(tiny.tokenizer_path), engine="hf")
    nothing = prepared(tmp_path_factory.mktemp("nothing"), some_texts(20, seed=2), tokenizer=tokenizer, held_out_fraction=0.0)
    return Loader(data(tiny, nothing, tiny_second), split="validation", seed=0, vocab_size=tiny.vocab_size)


def test_held_out_samples_of_every_source(three: Loader) -> None:
    everything = three.held_out_samples()
    assert list(everything) == ["s0", "s2"], "a source without held-out text is left out"
    assert [number for numbers in everything.values() for number in numbers] == list(range(three.num_samples))
    assert all(three.source_of(number) == name for name, numbers in everything.items() for number in numbers)
    assert three.held_out_samples(three.num_samples) == three.held_out_samples(10**6) == everything


def test_few_held_out_samples_are_spread_over_the_sources(three: Loader) -> None:
    everything = three.held_out_samples()
    sizes = {name: len(numbers) for name, numbers in everything.items()}
    assert sizes["s0"] > 2 * sizes["s2"] > 0
    for most in range(2, three.num_samples):
        chosen = three.held_out_samples(most)
        assert sum(map(len, chosen.values())) == most
        for name, numbers in chosen.items():
            assert numbers == everything[name][: len(numbers)], "the first ones of each"
            assert abs(len(numbers) - most * sizes[name] / three.num_samples) < 1 or len(numbers) == 1
    assert three.held_out_samples(1) == {name: numbers[:1] for name, numbers in everything.items()}, "one of each at least"


def test_shapes_and_types_are_fixed(tiny: Manifest) -> None:
    import torch

    config = data(tiny)
    train = Loader(config, split="train", seed=0, vocab_size=tiny.vocab_size)
    validation = Loader(config, split="validation", seed=0, vocab_size=tiny.vocab_size)
    assert train.max_bounds(4) == validation.max_bounds(4)
    shapes = {tuple(batch.document_bounds.shape) for batch in (train.micro_batch(range(i, i + 4)) for i in range(0, 400, 4))}
    assert shapes == {(train.max_bounds(4),)}
    batch = train.micro_batch([3, 1])
    assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
    assert batch.document_bounds.dtype == torch.int32
    assert all(getattr(batch, name).is_contiguous() for name in ("tokens", "labels", "positions", "document_bounds"))
    with pytest.raises(TypeError, match="no end"):
        _ = train.num_samples


def test_a_sample_does_not_depend_on_its_batch(tiny: Manifest) -> None:
    loader = Loader(data(tiny), split="train", seed=0, vocab_size=tiny.vocab_size)
    together = loader.micro_batch([11, 12, 13])
    alone = loader.micro_batch([12])
    assert together.tokens[48:96].tolist() == alone.tokens.tolist()
    assert together.labels[48:96].tolist() == alone.labels.tolist()


def test_describe_names_the_documents(tiny: Manifest) -> None:
    loader = Loader(data(tiny), split="validation", seed=0, vocab_size=tiny.vocab_size)
    named = {name for sample in range(loader.num_samples) for name in loader.describe(sample)}
    listed = [
        json.loads(line)
        for shard in tiny.shards_of("validation")
        for line in (tiny.folder / f"{shard.stem}.ids.jsonl").read_text().splitlines()
    ]
    assert named == set(listed) and len(listed) == tiny.num_documents("validation")


def test_fingerprint_changes_with_what_changes_the_batches(tiny: Manifest, tiny_second: Manifest) -> None:
    def fingerprint(config: DataConfig, seed: int = 0) -> str:
        return Loader(config, split="train", seed=seed, vocab_size=tiny.vocab_size).fingerprint

    base = data(tiny, tiny_second)
    heavier = (base.sources[0], dataclasses.replace(base.sources[1], weight=2.0))
    prints = [
        fingerprint(base),
        fingerprint(base, seed=1),
        fingerprint(data(tiny)),
        fingerprint(data(tiny, tiny_second, sequence_length=49)),
        fingerprint(data(tiny, tiny_second, document_mask=False)),
        fingerprint(dataclasses.replace(base, sources=heavier)),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(dataclasses.replace(base, sources=base.sources[::-1])) == prints[0]


def test_id_beyond_the_models_vocabulary(tiny: Manifest) -> None:
    with pytest.raises(
        UserError, match=r"train-00000.bin: token id \d+ is beyond model.vocab_size=200; give model.vocab_size=300"
    ):
        Loader(data(tiny), split="train", seed=0, vocab_size=200)


def test_id_that_appears_after_the_manifest(own_copy: Path, tiny: Manifest) -> None:
    path = own_copy / "train-00001.bin"
    tokens = np.fromfile(path, dtype=tiny.dtype)
    tokens[5] = 60_000
    tokens.tofile(path)
    config = DataConfig(sources=(SourceConfig(path=str(own_copy)),), sequence_length=48)
    loader = Loader(config, split="train", seed=0, vocab_size=tiny.vocab_size)
    expected = (
        r"train-00001.bin, token \d+ of train: token id 60000 is beyond model.vocab_size=300; .* damaged: data.verify=full"
    )
    with pytest.raises(UserError, match=expected):
        for first in range(0, 2000, 8):
            loader.micro_batch(range(first, first + 8))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of megatron-core's half-made reader
def test_a_shard_that_only_this_machine_lacks(own_copy: Path) -> None:
    """The first rank has read the manifest and seen all files; this one has another folder under the same name."""
    manifest = read_manifest(own_copy)
    (own_copy / "train-00001.bin").unlink()
    config = DataConfig(sources=(SourceConfig(path=str(own_copy)),), sequence_length=48)
    with pytest.raises(UserError, match=r"train-00001.bin: is not there on .*, though manifest.json lists it"):
        Loader(config, split="train", seed=0, vocab_size=300, manifests=(manifest,))


def test_more_documents_than_the_manifest_promises(own_copy: Path, tiny: Manifest) -> None:
    for shard in tiny.shards_of("train"):
        path = own_copy / f"{shard.stem}.bin"
        tokens = np.fromfile(path, dtype=tiny.dtype)
        tokens[:] = tiny.eod_id
        tokens.tofile(path)
    config = DataConfig(sources=(SourceConfig(path=str(own_copy)),), sequence_length=48)
    with pytest.raises(UserError, match=r"manifest.json: samples \[0, 1\] hold 96 documents, `densest` allows"):
        Loader(config, split="train", seed=0, vocab_size=tiny.vocab_size).micro_batch([0, 1])


def test_no_held_out_text(tmp_path: Path) -> None:
    manifest = prepared(tmp_path, some_texts(20), held_out_fraction=0.0)
    with pytest.raises(UserError, match="no held-out text to evaluate on; prepare with held_out_fraction above 0"):
        Loader(data(manifest), split="validation", seed=0, vocab_size=manifest.vocab_size)


def test_loading_is_quick(tiny: Manifest) -> None:
    """A million tokens a second and core is the least; a quarter of it leaves room for a busy machine."""
    loader = Loader(data(tiny, sequence_length=256), split="train", seed=0, vocab_size=tiny.vocab_size)
    start = time.process_time()
    tokens = sum(loader.micro_batch(range(first, first + 16)).tokens.numel() for first in range(0, 800, 16))
    assert tokens / (time.process_time() - start) > 250_000


def test_corpus_reads_across_shards(tiny: Manifest) -> None:
    corpus, stream = Corpus(tiny.folder, "train"), stream_of(tiny, "train")
    assert len(tiny.shards_of("train")) >= 3
    assert corpus.num_tokens == len(stream) == tiny.num_tokens("train")
    for start, count in ((0, len(stream)), (4000, 5000), (len(stream) - 3, 3), (0, 0), (len(stream), 0)):
        assert corpus.read(start, count).tolist() == stream[start : start + count]
    for start, count in ((-1, 2), (len(stream) - 1, 2), (5, -1)):
        with pytest.raises(IndexError):
            corpus.read(start, count)
    assert corpus.windows(100) == (len(stream) - 1) // 100


# megatron-core's half-made object complains when it is taken down; it is gone all the same.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_corpus_with_a_foreign_index(own_copy: Path) -> None:
    path = own_copy / "train-00000.idx"
    content = bytearray(path.read_bytes())
    content[0] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match="train-00000.idx: damaged"):
        Corpus(own_copy, "train")
    assert (own_copy / MANIFEST_FILE).exists()


class TestPrefetcher:
    def test_order_and_end(self) -> None:
        with Prefetcher(lambda value: value * 2, range(20), depth=3) as ahead:
            assert list(ahead) == list(range(0, 40, 2))
            assert list(ahead) == []

    def test_works_ahead_but_not_further_than_its_depth(self) -> None:
        made: list[int] = []
        with Prefetcher(lambda value: made.append(value) or value, iter(range(100)), depth=2) as ahead:
            time.sleep(0.3)
            assert made == [0, 1, 2]  # two wait, one is in the thread's hands
            assert next(ahead) == 0

    def test_errors_come_up_in_their_place(self) -> None:
        def function(value: int) -> int:
            if value == 3:
                raise UserError("the fourth")
            return value

        with Prefetcher(function, range(10)) as ahead:
            assert [next(ahead) for _ in range(3)] == [0, 1, 2]
            with pytest.raises(UserError, match="the fourth"):
                next(ahead)
            assert list(ahead) == []

    def test_errors_of_the_items_come_up(self) -> None:
        def items() -> Iterator[int]:
            yield 1
            raise RuntimeError("no more")

        with Prefetcher(lambda value: value, items()) as ahead, pytest.raises(RuntimeError, match="no more"):
            list(ahead)

    def test_close_ends_the_thread(self) -> None:
        before = threading.active_count()
        ahead = Prefetcher(lambda value: value, iter(int, 1), depth=1)
        next(ahead)
        ahead.close()
        ahead.close()
        assert threading.active_count() == before
        assert list(ahead) == []
