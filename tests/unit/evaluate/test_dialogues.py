"""What a model that knows turns reads of a dialogue, also of one that the run of another model has kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import UserError
from data_pipeline.chat import BUILT_IN
from data_pipeline.tasks import Row
from tests.unit.convert.checkpoints import LLAMA
from tests.unit.data_pipeline.labelled import chat, json_lines, prepared, task_of, tokenizer_in
from train.evaluate.dialogues import with_prompts
from train.inference.chat import ChatFormat, chat_format
from train.inference.text_model import TextModel


def form_in(folder: Path, template: str, *, system: str | None = None) -> ChatFormat:
    tokenizer = tokenizer_in(folder, template=BUILT_IN[template])
    text = TextModel(model=replace(LLAMA, vocab_size=tokenizer.vocab_size), tokenizer=tokenizer, opening=())
    return replace(chat_format(text, None), system=system)


def kept_rows(folder: Path, form: ChatFormat) -> list[Row]:
    """What a run of this form has held out."""
    files = [
        json_lines(folder / f"{name}.jsonl", {"messages": chat("one", "two", "three", f"{name} words")}) for name in ("a", "b")
    ]
    task = task_of("dialogue", files[0], validation=(files[1],))
    return prepared(task, form.tokenizer, folder / "rows", template=None, system=form.system).validation_rows()


def test_rows_that_a_run_has_kept_are_as_it_has_kept_them_for_its_own_model(tmp_path: Path) -> None:
    form = form_in(tmp_path / "own", "chatml", system="Be kind.")
    kept = kept_rows(tmp_path, form)
    assert "Be kind." in kept[0].prompt and with_prompts(kept, form) == kept


def test_another_model_reads_them_in_its_own_form(tmp_path: Path) -> None:
    kept = kept_rows(tmp_path, form_in(tmp_path / "own", "chatml", system="Be kind."))
    (row,) = with_prompts(kept, form_in(tmp_path / "other", "plain", system="Be brief."))
    assert (
        row.prompt == "### system\nBe brief.\n### user\none\n### assistant\ntwo<|endoftext|>\n### user\nthree\n### assistant\n"
    )
    assert row == replace(kept[0], prompt=row.prompt)


def test_a_kept_row_without_turns(tmp_path: Path) -> None:
    row = Row(id="rows.jsonl:3", source="rows.jsonl", prompt="one", truths=("two",))
    with pytest.raises(UserError, match=r"^rows.jsonl:3: has no turns, as it was kept as a prompt and an answer"):
        with_prompts([row], form_in(tmp_path / "own", "plain"))
