"""Preferences out of every form; both rows of a pair cut alike, kept together, and told from what is no preference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from data_pipeline.encoded_rows import EncodedRows
from data_pipeline.loader import IGNORE
from data_pipeline.manifest import Split
from data_pipeline.pair_loader import PairLoader
from data_pipeline.preferences import fitted
from data_pipeline.row_encoding import Tokens
from data_pipeline.tokenizer import Tokenizer
from tests.unit.data_pipeline.labelled import chat, json_lines, prepared, task_of, tokenizer_in

ASKED, GOOD, BAD = "the user asks", " one answer", " two words of an answer"
TEXTS = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
END, OPEN, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPLITS: tuple[Split, Split] = ("train", "validation")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


def made(folder: Path, tokenizer: Tokenizer, *rows: object, fields: dict | None = None, **changes: object) -> EncodedRows:
    task = task_of("preference", json_lines(folder / "a.jsonl", *rows), fields=fields or {})
    return prepared(task, tokenizer, folder / "rows", **changes)


def seen(encoded: EncodedRows, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """What the model reads of every row and does not learn, and what it learns."""
    arrays, found = encoded.arrays("train"), []
    bounds = arrays.row_starts_R1.tolist()
    for first, last in zip(bounds, bounds[1:], strict=False):
        tokens_N, labels_N = arrays.tokens_N[first:last], arrays.labels_N[first:last]
        targets = labels_N != IGNORE
        begin = int(np.flatnonzero(targets)[0]) + 1
        found.append((text_of(tokenizer, tokens_N[:begin]), text_of(tokenizer, labels_N[targets])))
    return found


def text_of(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False)


def asked(*turns: str) -> str:
    roles = ("user", "assistant")
    said = "".join(f"{OPEN}{roles[number % 2]}\n{text}{CLOSE}\n" for number, text in enumerate(turns))
    return f"{said}{OPEN}assistant\n"


@pytest.mark.parametrize(
    ("row", "changes", "prompt", "answers"),
    [
        (TEXTS, {}, ASKED, (GOOD + END, BAD + END)),
        ({"question": ASKED, "chosen": GOOD, "rejected": BAD}, {}, ASKED, (GOOD + END, BAD + END)),
        (
            {"q": ASKED, "better": GOOD, "worse": BAD},
            {"fields": {"prompt": "q", "chosen": "better", "rejected": "worse"}},
            ASKED,
            (GOOD + END, BAD + END),
        ),
        ({"chosen": ASKED + " one", "rejected": ASKED + " two"}, {}, ASKED, (" one" + END, " two" + END)),
        (TEXTS, {"template": "chatml"}, asked(ASKED), (GOOD.strip() + CLOSE, BAD.strip() + CLOSE)),
        ({"chosen": chat("a", "b"), "rejected": chat("a", "c")}, {}, asked("a"), ("b" + CLOSE, "c" + CLOSE)),
        (
            {"prompt": "ignored", "chosen": chat("a", "b", "c", "d"), "rejected": chat("a", "b", "c", "e")},
            {},
            asked("a", "b", "c"),
            ("d" + CLOSE, "e" + CLOSE),
        ),
        (
            {"prompt": "a", "chosen": chat("a", "b")[1:], "rejected": chat("a", "c")[1:]},
            {},
            asked("a"),
            ("b" + CLOSE, "c" + CLOSE),
        ),
        (
            {"prompt": chat("a"), "chosen": chat("a", "b")[1:], "rejected": chat("a", "c")[1:]},
            {},
            asked("a"),
            ("b" + CLOSE, "c" + CLOSE),
        ),
        (
            {"chosen": chat("a", "b"), "rejected": chat("a", "c", "d", "e")},
            {},
            asked("a"),
            ("b" + CLOSE, "c" + CLOSE + "e" + CLOSE),
        ),
        (
            {"chosen": chat("a", "b"), "rejected": chat("a", "c")},
            {"system": "s"},
            f"{OPEN}system\ns{CLOSE}\n" + asked("a"),
            ("b" + CLOSE, "c" + CLOSE),
        ),
    ],
)
def test_every_form(tmp_path: Path, tokenizer: Tokenizer, row, changes, prompt: str, answers: tuple[str, str]) -> None:
    encoded = made(tmp_path, tokenizer, row, **changes)
    assert seen(encoded, tokenizer) == [(prompt, answer) for answer in answers]
    assert encoded.num_rows("train") == 1 and (encoded.template is None) == (OPEN not in prompt)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (TEXTS | {"chosen": ""}, "chosen is empty"),
        (TEXTS | {"rejected": " "}, "rejected is empty"),
        (TEXTS | {"rejected": GOOD}, "chosen and rejected are the same, so neither is preferred"),
        (TEXTS | {"rejected": None}, "rejected is null"),
        (TEXTS | {"prompt": None}, "column prompt is null"),
        (TEXTS | {"prompt": chat("a")}, "prompt holds messages, chosen and rejected text"),
        ({"chosen": chat("a", "b"), "rejected": chat("a", "b")}, "chosen and rejected are the same"),
        ({"chosen": chat("a", "b"), "rejected": chat("x", "c")}, "chosen does not begin with the other's prompt"),
        ({"chosen": chat("a", "b"), "rejected": chat("a", "c", "d")}, "rejected does not end with a turn of the assistant"),
        ({"chosen": chat("a", "b"), "rejected": chat("a", " ")}, "an answer in rejected is empty"),
        ({"chosen": chat("a", "b")[1:], "rejected": chat("a", "c")[1:]}, "prompt is no column"),
        ({"chosen": [], "rejected": chat("a", "c")}, "chosen holds no turn"),
    ],
)
def test_what_is_no_preference_is_told_and_counted(tmp_path: Path, tokenizer: Tokenizer, row: dict, what: str) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1: ") as caught:
        made(tmp_path, tokenizer, row, TEXTS)
    assert what in str(caught.value)
    encoded = made(tmp_path, tokenizer, row, TEXTS, bad_rows="drop")
    assert encoded.num_rows("train") == 1 and sum(drop.count for drop in encoded.report.dropped) == 1


@pytest.mark.parametrize(
    ("task", "data", "what"),
    [
        ({}, {"targets": "all"}, "data.targets=all: is not for task=preference"),
        (
            {},
            {"system": "s"},
            r"data.system='s': is for dialogues, and a.jsonl:1 is a preference of texts; leave it out, or give",
        ),
        ({"fields": {"answer": "b"}}, {}, "task.fields: answer is no part of task=preference"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, tokenizer: Tokenizer, task: dict, data: dict, what: str) -> None:
    with pytest.raises(UserError, match=what):
        made(tmp_path, tokenizer, TEXTS, **task, **data)


def row_of(prompt: int, answer: int, *, head: int = 0) -> Tokens:
    ids = [*range(100, 100 + prompt), *range(200, 200 + answer)]
    return Tokens(ids=ids, flags=[False] * prompt + [True] * answer, head=head, answer=prompt)


class TestCutting:
    def test_prompts_lose_as_much_and_answers_stay(self) -> None:
        chosen, rejected = fitted([row_of(20, 3), row_of(20, 6)], 30)
        assert chosen.ids[:-3] == rejected.ids[:-6] and chosen.ids[-3:] == [200, 201, 202] and len(rejected.ids) == 11 + 6
        assert len(chosen.ids) - 1 + len(rejected.ids) - 1 <= 30

    def test_the_head_stays(self) -> None:
        chosen, _ = fitted([row_of(20, 3, head=2), row_of(20, 6, head=2)], 20)
        assert chosen.ids[:2] == [100, 101] and chosen.ids[2] > 110

    @pytest.mark.parametrize(
        ("lengths", "room", "left"), [((9, 30), 20, (9, 11)), ((30, 30), 20, (10, 10)), ((3, 30), 8, (3, 5))]
    )
    def test_answers_end_at_one_length(self, lengths: tuple[int, int], room: int, left: tuple[int, int]) -> None:
        pair = fitted([row_of(5, length) for length in lengths], room)
        assert tuple(sum(tokens.flags) for tokens in pair) == left
        assert [len(tokens.ids) for tokens in pair] == [1 + length for length in left]

    def test_nothing_left(self) -> None:
        assert fitted([row_of(5, 3), row_of(5, 3)], 1) is None
        assert fitted([row_of(5, 3), row_of(5, 3)], 14) is not None

    def test_rows_that_become_alike_are_left_out(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        long = {"prompt": "a", "chosen": " one" * 90 + " two", "rejected": " one" * 90 + " three"}
        encoded = made(tmp_path, tokenizer, long, TEXTS)
        (drop,) = encoded.report.dropped
        assert "cut to data.sequence_length=64 for both, chosen and rejected are the same tokens" in drop.first


@pytest.mark.parametrize("as_messages", [True, False])
def test_a_question_is_in_one_split_with_all_its_answers(tmp_path: Path, tokenizer: Tokenizer, as_messages: bool) -> None:
    rows = []
    for number in range(60):
        row = {"prompt": f"{number // 3}?", "chosen": f" one {number}", "rejected": f" two {number}"}
        if as_messages:
            asked = {"role": "user", "content": row.pop("prompt")}
            row = {key: [asked, {"role": "assistant", "content": text}] for key, text in row.items()}
        rows.append(row)
    encoded = made(tmp_path, tokenizer, *rows, validation_fraction=0.3)
    numbers = {split: [int(name.split(":")[1].split(",")[0]) - 1 for name in encoded.row_ids(split)] for split in SPLITS}
    assert sorted(numbers["train"] + numbers["validation"]) == sorted([*range(60)] * 2), "two rows each"
    questions = {split: {number // 3 for number in found} for split, found in numbers.items()}
    assert 2 < len(questions["validation"]) < 12 and not questions["train"] & questions["validation"]


@pytest.mark.parametrize("packing", [True, False])
def test_a_pair_stays_together(tmp_path: Path, tokenizer: Tokenizer, packing: bool) -> None:
    rows = [
        {"prompt": f"{number}{' one' * (number % 7)}", "chosen": f" {number}", "rejected": f" two{' two' * (number % 5)}"}
        for number in range(40)
    ]
    encoded = made(tmp_path, tokenizer, *rows, packing=packing)
    loader = PairLoader(encoded, split="train", sequence_length=64, seed=0, vocab_size=400)
    assert loader.num_rows == 80 and (loader.samples_per_epoch == 40) != packing
    assert loader.micro_batch([0, 1]).references is None
    loader.references_R = np.arange(80, dtype=np.float32) - 0.5
    found: list[int] = []
    for first in range(0, loader.samples_per_epoch - 1, 2):
        batch, placed_D = loader.micro_batch([first, first + 1]), loader.rows_in([first, first + 1])
        rows_D = placed_D[placed_D >= 0]
        assert (rows_D[::2] % 2 == 0).all() and (rows_D[1::2] == rows_D[::2] + 1).all()
        assert batch.target_tokens == len(rows_D) // 2 and batch.target_bytes == 0
        assert batch.references.shape == batch.document_bounds.shape
        expected = [row - 0.5 if row >= 0 else 0.0 for row in placed_D.tolist()]
        assert batch.references[: len(placed_D)].tolist() == expected and not batch.references[len(placed_D) :].any()
        bounds = batch.document_bounds.tolist()
        has_targets = [bool((batch.labels[start:end] != IGNORE).any()) for start, end in zip(bounds, bounds[1:], strict=False)]
        assert has_targets[: len(placed_D)] == (placed_D >= 0).tolist() and not any(has_targets[len(placed_D) :])
        found += rows_D.tolist()
    assert len(set(found)) == len(found) > 70
    assert [text.endswith(", rejected") for text in encoded.row_ids("train")] == [False, True] * 40
