"""Labelled rows for tests: a small tokenizer with the tokens of a chat, files of rows, and what is prepared of them."""

from __future__ import annotations

import json
from pathlib import Path

from data_pipeline.config import TokenizerConfig
from data_pipeline.encoded_rows import EncodedRows
from data_pipeline.row_preparation import prepare_rows
from data_pipeline.rows_config import RowsConfig
from data_pipeline.task_config import TaskConfig, TaskSource
from data_pipeline.tokenizer import Tokenizer, train_tokenizer

CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")
TEXT = "the assistant says what the user asks of the system, and then: one, two, three words of an answer.\n"


def tokenizer_in(folder: Path, *, special: tuple[str, ...] = CHAT_TOKENS, template: str | None = None) -> Tokenizer:
    """A byte-level BPE of some 300 ids."""
    config = TokenizerConfig(vocab_size=300 + len(special), extra_special_tokens=special[1:])
    train_tokenizer(config, [TEXT] * 40, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer(folder)


def json_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_of(kind: str, *paths: Path, validation: tuple[Path, ...] = (), **changes: object) -> TaskConfig:
    sources = {
        "data": tuple(TaskSource(path=str(path)) for path in paths),
        "validation": tuple(TaskSource(path=str(path)) for path in validation),
    }
    return TaskConfig(**{"kind": kind, "name": "lesson"} | sources | changes)  # type: ignore[arg-type]


def prepared(
    task: TaskConfig, tokenizer: Tokenizer, folder: Path, *, opening: tuple[int, ...] = (), seed: int = 0, **changes: object
) -> EncodedRows:
    """Rows of 64 tokens, none held out unless the task or `changes` say so."""
    usual = {"sequence_length": 64, "validation_fraction": 0.0}
    return prepare_rows(
        task,
        RowsConfig(**usual | changes),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        opening=opening,
        end_of_document=tokenizer.end_of_document()[0],
        vocab_size=tokenizer.vocab_size,
        seed=seed,
        folders=[folder],
    )


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of the user and the assistant, one after the other."""
    roles = ("user", "assistant")
    said = [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
    return said if system is None else [{"role": "system", "content": system}, *said]
