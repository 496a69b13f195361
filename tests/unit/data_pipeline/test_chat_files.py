"""The tokenizer's folder of a model that has learned to answer: one template, all end ids, tokenizer.json untouched."""

from __future__ import annotations

import json

import pytest

from conf.errors import UserError
from data_pipeline.chat import BUILT_IN, chat_template, own_template
from data_pipeline.chat_files import copy_for_answers, end_ids
from data_pipeline.tokenizer import Tokenizer
from tests.unit.data_pipeline.labelled import tokenizer_in

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is asked?"},
    {"role": "assistant", "content": "Three words."},
    {"role": "user", "content": "And then?"},
]


def _ids(tokenizer, *names):
    return [tokenizer.backend.token_to_id(name) for name in names]


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_transformers_writes_a_dialogue_as_training_did(tmp_path, name):
    from transformers import AutoTokenizer

    source = tokenizer_in(tmp_path / "source")
    template = chat_template(source, name)
    end, turn_end = _ids(source, "<|endoftext|>", "<|im_end|>")
    learned = turn_end if name == "chatml" else end
    copy_for_answers(source.folder, tmp_path / "made", template=template.text, endings=[learned])
    made = Tokenizer(tmp_path / "made")
    assert made.sha256 == source.sha256
    assert end_ids(made) == ((turn_end, end) if name == "chatml" else (end,))
    assert chat_template(made, None).text == template.text
    theirs = AutoTokenizer.from_pretrained(made.folder)
    for generation_prompt, messages in ((True, MESSAGES), (False, MESSAGES[:3])):
        ours = source.encode(template.render(messages, generation_prompt=generation_prompt), special=True)
        found = theirs.apply_chat_template(messages, add_generation_prompt=generation_prompt, return_dict=False)
        assert found == ours


def test_another_template_takes_the_place_of_those_that_are_there(tmp_path):
    source = tokenizer_in(tmp_path / "source", template="old")
    settings = source.folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "older"}))
    (source.folder / "chat_template.json").write_text('{"chat_template": "oldest"}')
    copy_for_answers(source.folder, tmp_path / "made", template=BUILT_IN["plain"], endings=())
    made = tmp_path / "made"
    assert (made / "chat_template.jinja").read_text() == BUILT_IN["plain"]
    assert json.loads((made / "tokenizer_config.json").read_text())["chat_template"] == BUILT_IN["plain"]
    assert not (made / "chat_template.json").exists()
    assert (source.folder / "chat_template.jinja").read_text() == "old", "the source stays"


def test_a_template_keeps_its_ends_of_lines(tmp_path):
    source = tokenizer_in(tmp_path / "source", template=None)
    settings = source.folder / "tokenizer_config.json"
    text = "{{ 'one' }}\r\n{{ 'two' }}"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": text}))
    assert own_template(Tokenizer(source.folder)) == text
    copy_for_answers(source.folder, tmp_path / "made", template=text, endings=())
    assert own_template(Tokenizer(tmp_path / "made")) == text, "rows of a run that goes on are those of before"


def test_what_a_model_brings_stays(tmp_path):
    source = tokenizer_in(tmp_path / "source", template="own")
    end, turn_end, start = _ids(source, "<|endoftext|>", "<|im_end|>", "<|im_start|>")
    (source.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": start, "temperature": 0.6}))
    copy_for_answers(source.folder, tmp_path / "made", template=None, endings=[turn_end, end])
    assert (tmp_path / "made/chat_template.jinja").read_text() == "own"
    found = json.loads((tmp_path / "made/generation_config.json").read_text())
    assert found == {"eos_token_id": [turn_end, end, start], "temperature": 0.6}
    copy_for_answers(tmp_path / "made", tmp_path / "again", template=None, endings=[start])
    assert json.loads((tmp_path / "again/generation_config.json").read_text()) == found


def test_a_folder_that_cannot_be_written(tmp_path):
    source = tokenizer_in(tmp_path / "source")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        copy_for_answers(source.folder, tmp_path / "file/made", template=None, endings=())
