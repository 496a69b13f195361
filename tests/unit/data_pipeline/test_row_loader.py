"""Encoded rows as micro-batches: each row whole, alone and in its place, whatever it shares a sequence with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.encoded_rows import EncodedRows
from data_pipeline.loader import IGNORE, MicroBatch
from data_pipeline.row_loader import RowLoader
from data_pipeline.tokenizer import Tokenizer
from tests.unit.data_pipeline.labelled import json_lines, prepared, task_of, tokenizer_in

LENGTH = 48
PAIRS = [
    {"prompt": f"{number}{' one' * (number % 9)}", "completion": f":{' two' * (number % 4)} {number}"} for number in range(70)
]

Seen = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return json_lines(tmp_path_factory.mktemp("rows") / "a.jsonl", *PAIRS).parent


def rows_in(folder: Path, tokenizer: Tokenizer, name: str, **changes: object) -> EncodedRows:
    task = task_of("generation", folder / "a.jsonl")
    return prepared(task, tokenizer, folder / name, **{"sequence_length": LENGTH, "validation_fraction": 0.3} | changes)


@pytest.fixture(scope="module")
def packed(folder: Path, tokenizer: Tokenizer) -> EncodedRows:
    return rows_in(folder, tokenizer, "packed")


def loader(encoded: EncodedRows, split: str = "train", *, seed: int = 0, **changes: object) -> RowLoader:
    usual = {"sequence_length": encoded.sequence_length, "vocab_size": 400}
    return RowLoader(encoded, split=split, seed=seed, **usual | changes)  # type: ignore[arg-type]


def documents(batch: MicroBatch) -> list[Seen]:
    """Tokens, labels and positions of every document, padding included, by the bounds."""
    bounds = batch.document_bounds.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(batch.tokens) and bounds == sorted(bounds)
    parts = [batch.tokens.tolist(), batch.labels.tolist(), batch.positions.tolist()]
    return [
        tuple(tuple(part[first:last]) for part in parts)  # type: ignore[misc]
        for first, last in zip(bounds, bounds[1:], strict=False)
        if first < last
    ]


def epoch(loader: RowLoader, *, batch: int = 1) -> list[Seen]:
    """All documents of one epoch that have something to learn."""
    numbers = range(loader.samples_per_epoch)
    batches = [loader.micro_batch(numbers[first : first + batch]) for first in range(0, len(numbers), batch)]
    return [seen for made in batches for seen in documents(made) if any(label != IGNORE for label in seen[1])]


class TestBatches:
    def test_each_row_is_whole_and_as_it_is_alone(self, packed: EncodedRows, folder: Path, tokenizer: Tokenizer) -> None:
        alone = rows_in(folder, tokenizer, "alone", packing=False)
        assert alone.num_sequences("train") == alone.num_rows("train") > 2 * packed.num_sequences("train")
        seen = epoch(loader(packed), batch=3)
        assert Counter(seen) == Counter(epoch(loader(alone)))
        assert len(seen) == packed.num_rows("train")
        assert all(positions == tuple(range(len(positions))) for _, _, positions in seen)

    def test_rows_are_what_the_files_say(self, packed: EncodedRows, tokenizer: Tokenizer) -> None:
        texts = []
        for tokens, labels, _ in epoch(loader(packed)):
            assert all(label in (IGNORE, token) for label, token in zip(labels, tokens[1:], strict=False))
            assert labels[-1] == tokenizer.end_of_document()[0]
            texts.append(tokenizer.decode([*tokens, labels[-1]]))
        held_out = [row.prompt + row.truths[0] for row in packed.validation_rows()]
        assert sorted(texts + held_out) == sorted(pair["prompt"] + pair["completion"] for pair in PAIRS)

    def test_padding_is_one_document_without_targets(self, packed: EncodedRows) -> None:
        for number in range(packed.num_sequences("train")):
            batch = loader(packed).micro_batch([number])
            *_, last = documents(batch)
            if any(label != IGNORE for label in last[1]):
                continue
            assert set(last[0]) == {packed.end_of_document} and last[2] == tuple(range(len(last[0])))
            return
        pytest.fail("no sequence was padded")

    def test_shapes_are_the_same_for_all_batches(self, packed: EncodedRows) -> None:
        train, held_out = loader(packed), loader(packed, "validation")
        made = [part.micro_batch([number, 1 - number]) for part in (train, held_out) for number in range(2)]
        assert {tuple(batch.document_bounds.shape) for batch in made} == {(train.max_bounds(2),)}
        assert held_out.max_bounds(2) == train.max_bounds(2) == 2 * packed.documents_per_sequence + 1
        assert {(batch.tokens.shape, batch.labels.shape, batch.positions.shape) for batch in made} == {((2 * LENGTH,),) * 3}
        assert {str(batch.document_bounds.dtype) for batch in made} == {"torch.int32"}

    def test_counts(self, packed: EncodedRows, tokenizer: Tokenizer) -> None:
        batch = loader(packed).micro_batch([0, 1])
        targets = [label for label in batch.labels.tolist() if label != IGNORE]
        assert batch.target_tokens == len(targets)
        assert batch.target_bytes == len(tokenizer.decode(targets).encode())
        one, other = (loader(packed).micro_batch([number]) for number in (0, 1))
        assert batch.data_hash == (one.data_hash + other.data_hash) % 2**64 and one.data_hash != other.data_hash
        assert batch.sample_ids == (0, 1)

    def test_a_label_at_the_last_token(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        rows = [{"sentence": f"text {number}", "label": number % 3 + 7} for number in range(30)]
        encoded = prepared(task_of("classification", json_lines(tmp_path / "a.jsonl", *rows)), tokenizer, tmp_path / "rows")
        found = {}
        for tokens, labels, _ in epoch(loader(encoded)):
            assert set(labels[:-1]) <= {IGNORE}
            found[tokenizer.decode(list(tokens))] = encoded.labels[labels[-1]]
        assert found == {row["sentence"]: str(row["label"]) for row in rows}
        batch = loader(encoded).micro_batch([0])
        assert batch.target_bytes == 0 and batch.target_tokens == len(loader(encoded).describe(0))


class TestOrder:
    def test_every_sequence_once_in_each_epoch(self, packed: EncodedRows) -> None:
        train = loader(packed)
        count = train.samples_per_epoch
        epochs = [[tuple(train.describe(number)) for number in range(first, first + count)] for first in (0, count)]
        assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
        assert sum(map(len, epochs[0])) == packed.num_rows("train")

    def test_is_of_the_seed_and_the_number_alone(self, packed: EncodedRows) -> None:
        train = loader(packed)
        far = train.micro_batch([10**9]).tokens.tolist()
        assert far == loader(packed).micro_batch([10**9]).tokens.tolist()
        orders = [[part.describe(number) for number in range(8)] for part in (train, loader(packed, seed=1))]
        assert orders[0] != orders[1] and train.fingerprint != loader(packed, seed=1).fingerprint

    def test_held_out_rows_in_order(self, packed: EncodedRows) -> None:
        held_out = loader(packed, "validation")
        assert held_out.num_samples == packed.num_sequences("validation") == held_out.samples_per_epoch
        assert held_out.held_out_samples() == {"lesson": range(held_out.num_samples)}
        assert held_out.held_out_samples(1) == {"lesson": range(1)} and held_out.names == ("lesson",)
        ids = [one for number in range(held_out.num_samples) for one in held_out.describe(number)]
        assert sorted(ids) == sorted(packed.row_ids("validation"))
        with pytest.raises(IndexError, match="has samples 0 to"):
            held_out.micro_batch([held_out.num_samples])
        with pytest.raises(TypeError, match="the training samples have no end"):
            _ = loader(packed).num_samples

    @pytest.mark.parametrize("packing", [True, False])
    def test_few_held_out_samples_are_like_all(self, tmp_path: Path, tokenizer: Tokenizer, packing: bool) -> None:
        rows = [{"prompt": "one, " * (number % 12), "completion": f"{number}"} for number in range(600)]
        held_out = json_lines(tmp_path / "held_out.jsonl", *sorted(rows, key=lambda row: -len(row["prompt"])))
        train = json_lines(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
        task = task_of("generation", train, validation=(held_out,))
        part = loader(prepared(task, tokenizer, tmp_path / "rows", packing=packing), "validation")
        few = part.held_out_samples(part.num_samples // 4)["lesson"]
        lengths = [
            np.mean(
                [len(seen[0]) for number in numbers for seen in documents(part.micro_batch([number])) if seen[1][-1] != IGNORE]
            )
            for numbers in (few, range(part.num_samples))
        ]
        assert abs(lengths[0] / lengths[1] - 1) < 0.15

    def test_where_a_sample_is_from(self, packed: EncodedRows, tokenizer: Tokenizer) -> None:
        train = loader(packed)
        assert train.source_of(3) == "lesson" and all(one.startswith("a.jsonl:") for one in train.describe(3))
        texts = {f"a.jsonl:{number + 1}": pair["prompt"] + pair["completion"] for number, pair in enumerate(PAIRS)}
        shown = [
            tokenizer.decode([*tokens, labels[-1]])
            for tokens, labels, _ in documents(train.micro_batch([3]))
            if labels[-1] != IGNORE
        ]
        assert [texts[one] for one in train.describe(3)] == shown[: len(train.describe(3))]
        assert train.tokenizer_folder == tokenizer.folder.resolve()


class TestWhatIsWrong:
    def test_another_length(self, packed: EncodedRows) -> None:
        with pytest.raises(UserError, match=rf"its sequences have {LENGTH} tokens, the run's 64; remove it"):
            loader(packed, sequence_length=64)

    def test_no_held_out_rows(self, folder: Path, tokenizer: Tokenizer) -> None:
        encoded = rows_in(folder, tokenizer, "none", validation_fraction=0.0)
        with pytest.raises(UserError, match="holds no validation rows; give task.validation"):
            loader(encoded, "validation")

    def test_ids_beyond_the_model(self, packed: EncodedRows) -> None:
        most = int(np.max(packed.arrays("train").tokens_N))
        loader(packed, vocab_size=most + 1)
        with pytest.raises(UserError, match=rf"holds token id {most}, the model knows ids below {most}"):
            loader(packed, vocab_size=most)
