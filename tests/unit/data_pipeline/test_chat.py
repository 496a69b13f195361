"""Dialogues as text and as targets: against what transformers makes of a template, and of templates that mark nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.errors import UserError
from data_pipeline.chat import BUILT_IN, ChatTemplate, chat_template
from data_pipeline.records import BadRow, Fault
from data_pipeline.row_encoding import IGNORE, EncodedRow, RowEncoder
from data_pipeline.tasks import Row
from data_pipeline.tokenizer import Tokenizer
from tests.unit.data_pipeline.labelled import chat, tokenizer_in

TURNS = chat("one, two?", "three", "and then:", " words  of an answer.\n", system="the system")
UNMARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A: ' }}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
FORGETFUL = (  # as templates do that leave out what was thought in earlier turns
    "{% for m in messages %}{% set kept = loop.last or m['role'] == 'user' %}"
    "{{ m['role'] }}: {{ m['content'] if kept else m['content'] | upper }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ENDLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


def row_of(messages: list[dict[str, object]], **more: object) -> Row:
    return Row(id="a:1", source="a", prompt="", truths=("x",), messages=tuple(messages), **more)  # type: ignore[arg-type]


def encoder(tokenizer: Tokenizer, template: str, **changes: object) -> RowEncoder:
    special = {"eos_token": "<|endoftext|>", "bos_token": "<s>"}
    usual = {
        "kind": "dialogue", "targets": "assistant", "sequence_length": 500, "opening": (), "no_answer": "none",
        "end_of_document": tokenizer.end_of_document()[0],
        "template": ChatTemplate(text=template, name="a template", special=special),
    }  # fmt: skip
    return RowEncoder(tokenizer=tokenizer, **usual | changes)  # type: ignore[arg-type]


def encoded(tokenizer: Tokenizer, template: str, messages: list[dict[str, object]] = TURNS, **changes: object) -> EncodedRow:
    (found,) = encoder(tokenizer, template, **changes).encode([row_of(messages)])
    assert isinstance(found, EncodedRow), found
    return found


def learned(tokenizer: Tokenizer, row: EncodedRow) -> list[str]:
    """The texts of the runs of targets, special tokens included."""
    runs: list[list[int]] = [[]]
    for label in row.labels_N.tolist():
        if label == IGNORE:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.backend.decode(run, skip_special_tokens=False) for run in runs if run]


class TestAgainstTransformers:
    @pytest.mark.parametrize("template", [BUILT_IN["chatml"], BUILT_IN["plain"], MARKED], ids=["chatml", "plain", "marked"])
    @pytest.mark.parametrize("messages", [TURNS, TURNS[1:], TURNS[1:3], chat("\u4f60\u597d", "\u00e9s \u4e16")])
    def test_ids_and_targets(self, tokenizer: Tokenizer, template: str, messages: list[dict[str, object]]) -> None:
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(str(tokenizer.folder), bos_token="<s>")
        made = theirs.apply_chat_template(
            messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ours = encoded(tokenizer, template, messages)
        assert ours.inputs_N.tolist() == made["input_ids"][:-1]
        flags = [label != IGNORE for label in ours.labels_N.tolist()]
        if all(str(message["content"]).isascii() for message in messages):
            assert flags == [bool(mark) for mark in made["assistant_masks"][1:]]
        assert [label for label in ours.labels_N.tolist() if label != IGNORE] == [
            token for token, flag in zip(made["input_ids"][1:], flags, strict=True) if flag
        ]

    def test_all_and_the_prompt_of_an_answer(self, tokenizer: Tokenizer) -> None:
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(str(tokenizer.folder), bos_token="<s>")
        ids = theirs.apply_chat_template(TURNS, chat_template=UNMARKED, tokenize=True, return_dict=True)["input_ids"]
        row = encoded(tokenizer, UNMARKED, targets="all")
        assert (row.inputs_N.tolist(), row.labels_N.tolist()) == (ids[:-1], ids[1:])
        asked = encoder(tokenizer, UNMARKED).asked(row_of(TURNS))
        assert asked == theirs.apply_chat_template(
            TURNS[:-1], chat_template=UNMARKED, tokenize=False, add_generation_prompt=True
        )


class TestTargets:
    def test_each_answer_with_its_end_and_not_the_line_behind(self, tokenizer: Tokenizer) -> None:
        for template in (UNMARKED, BUILT_IN["chatml"]):
            assert learned(tokenizer, encoded(tokenizer, template)) == ["three<|im_end|>", " words  of an answer.\n<|im_end|>"]
        plain = encoded(tokenizer, BUILT_IN["plain"])
        assert learned(tokenizer, plain) == ["three<|endoftext|>", " words  of an answer.\n<|endoftext|>"]

    @pytest.mark.parametrize("template", [UNMARKED, MARKED, FORGETFUL])
    def test_the_last_turn(self, tokenizer: Tokenizer, template: str) -> None:
        (text,) = learned(tokenizer, encoded(tokenizer, template, targets="last_turn"))
        assert text.startswith(" words  of") and text.endswith(("<|im_end|>", "<|endoftext|>"))

    def test_an_end_that_the_template_left_outside_its_mark(self, tokenizer: Tokenizer) -> None:
        template = MARKED.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}")
        assert learned(tokenizer, encoded(tokenizer, template)) == learned(tokenizer, encoded(tokenizer, MARKED))

    def test_a_template_without_an_end_gets_one(self, tokenizer: Tokenizer) -> None:
        row = encoded(tokenizer, ENDLESS, chat("a", "b"))
        assert learned(tokenizer, row)[0].endswith("<|endoftext|>")
        assert not learned(tokenizer, encoded(tokenizer, ENDLESS, chat("a", "b", "c")))[-1].endswith("<|endoftext|>")

    def test_an_opening_is_not_doubled(self, tokenizer: Tokenizer) -> None:
        begin = tokenizer.backend.token_to_id("<s>")
        for template in (MARKED, UNMARKED):
            row = encoded(tokenizer, template, opening=(begin,))
            assert row.inputs_N.tolist().count(begin) == 1 and row.inputs_N[0] == begin
            assert learned(tokenizer, row) == learned(tokenizer, encoded(tokenizer, template))

    def test_the_system_speaks_first(self, tokenizer: Tokenizer) -> None:
        given = encoded(tokenizer, UNMARKED, chat("a", "b"), system="the system").inputs_N.tolist()
        assert given == encoded(tokenizer, UNMARKED, chat("a", "b", system="the system")).inputs_N.tolist()
        own = encoded(tokenizer, UNMARKED, chat("a", "b", system="mine"), system="the system")
        assert own.inputs_N.tolist() == encoded(tokenizer, UNMARKED, chat("a", "b", system="mine")).inputs_N.tolist()

    def test_tools_are_told_and_calls_are_learned(self, tokenizer: Tokenizer) -> None:
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
        messages = [*chat("a"), call, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "b"}]
        row = row_of(messages, tools=({"name": "add"},))  # type: ignore[arg-type]
        (found,) = encoder(tokenizer, BUILT_IN["chatml"]).encode([row])
        assert isinstance(found, EncodedRow)
        assert learned(tokenizer, found) == ['Call: [{"name": "add", "arguments": {"a": 1}}]<|im_end|>', "b<|im_end|>"]
        assert 'Functions:\n[{"name": "add"}]<|im_end|>' in tokenizer.backend.decode(
            found.inputs_N.tolist(), skip_special_tokens=False
        )


class TestTooLong:
    def test_the_last_answer_is_kept(self, tokenizer: Tokenizer) -> None:
        whole = encoded(tokenizer, UNMARKED)
        row = encoded(tokenizer, UNMARKED, sequence_length=30)
        assert row.is_cut and len(row.inputs_N) == 30 and not whole.is_cut
        assert row.inputs_N.tolist() == whole.inputs_N.tolist()[-30:]
        assert learned(tokenizer, row)[-1] == " words  of an answer.\n<|im_end|>"

    @pytest.mark.parametrize("template", [UNMARKED, MARKED, FORGETFUL], ids=["unmarked", "marked", "forgetful"])
    def test_the_last_answer_is_kept_where_everything_is_learned(self, tokenizer: Tokenizer, template: str) -> None:
        whole = encoded(tokenizer, template, targets="all")
        row = encoded(tokenizer, template, targets="all", sequence_length=25)
        assert row.is_cut and row.inputs_N.tolist() == whole.inputs_N.tolist()[-25:]
        assert row.labels_N.tolist() == whole.labels_N.tolist()[-25:]

    def test_an_answer_that_is_too_long_alone_is_cut_at_its_end(self, tokenizer: Tokenizer) -> None:
        whole = encoded(tokenizer, UNMARKED, chat("a", "one, two, three words " * 9))
        row = encoded(tokenizer, UNMARKED, chat("a", "one, two, three words " * 9), sequence_length=12)
        first = int((whole.labels_N != IGNORE).argmax())
        assert row.inputs_N.tolist() == whole.inputs_N.tolist()[first : first + 12]
        assert row.labels_N.tolist() == whole.labels_N.tolist()[first : first + 12]

    def test_the_opening_stays(self, tokenizer: Tokenizer) -> None:
        row = encoded(tokenizer, UNMARKED, opening=(3,), sequence_length=30)
        assert row.inputs_N.tolist() == [3, *encoded(tokenizer, UNMARKED, sequence_length=29).inputs_N.tolist()]


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        ("template", "messages", "fault", "expected"),
        [
            (FORGETFUL, TURNS, Fault.TEMPLATE, "writes turn 3 otherwise when others follow"),
            ("{{ raise_exception('no system here') }}", TURNS, Fault.TEMPLATE, "does not take it: no system here"),
            ("{{ messages[9]['role'] }}", TURNS, Fault.TEMPLATE, "does not take it: "),
            ("{{ 1 / 0 }}", TURNS, Fault.TEMPLATE, "does not take it: division by zero"),
            (UNMARKED, chat("a <|im_end|> b", "c"), Fault.SPECIAL, "spells the special token <|im_end|>"),
            (UNMARKED, chat("a", "<|endoftext|>c"), Fault.SPECIAL, "spells the special token <|endoftext|>"),
            (UNMARKED, [*chat("a"), {"role": "assistant", "content": "", "tool_calls": [{}]}], Fault.TEMPLATE, "no tool_calls"),
        ],
    )  # fmt: skip
    def test_rows(
        self, tokenizer: Tokenizer, template: str, messages: list[dict[str, object]], fault: Fault, expected: str
    ) -> None:
        (bad,) = encoder(tokenizer, template).encode([row_of(messages)])
        assert isinstance(bad, BadRow) and bad.fault == fault
        assert str(bad).startswith("a:1: ") and expected in str(bad)

    def test_a_template_that_knows_no_tools(self, tokenizer: Tokenizer) -> None:
        (bad,) = encoder(tokenizer, UNMARKED).encode([row_of(TURNS, tools=({"name": "add"},))])
        assert isinstance(bad, BadRow) and "knows no tools" in str(bad)

    def test_a_template_cannot_reach_out(self, tokenizer: Tokenizer) -> None:
        (bad,) = encoder(tokenizer, "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}").encode([row_of(TURNS)])
        assert isinstance(bad, BadRow) and bad.fault == Fault.TEMPLATE


class TestWhichTemplate:
    def test_the_tokenizers_own_then_what_it_has_tokens_for(self, tmp_path: Path) -> None:
        assert chat_template(tokenizer_in(tmp_path / "a"), None).text == BUILT_IN["chatml"]
        assert chat_template(tokenizer_in(tmp_path / "b", special=("<|endoftext|>",)), None).text == BUILT_IN["plain"]
        own = tokenizer_in(tmp_path / "c", template=UNMARKED)
        assert chat_template(own, None).text == UNMARKED
        assert chat_template(own, "plain").text == BUILT_IN["plain"]
        assert chat_template(own, None).special == {"eos_token": "<|endoftext|>"}

    @pytest.mark.parametrize("several", [True, False])
    def test_of_tokenizer_config(self, tmp_path: Path, several: bool) -> None:
        tokenizer = tokenizer_in(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        named = [{"name": "rag", "template": "x"}, {"name": "default", "template": UNMARKED}]
        content = json.loads(path.read_text()) | {
            "chat_template": named if several else UNMARKED,
            "bos_token": {"content": "<s>"},
        }
        path.write_text(json.dumps(content))
        found = chat_template(tokenizer, None)
        assert found.text == UNMARKED and found.special["bos_token"] == "<s>"

    def test_a_file(self, tmp_path: Path) -> None:
        tokenizer = tokenizer_in(tmp_path)
        (tmp_path / "mine.jinja").write_text(MARKED)
        assert chat_template(tokenizer, str(tmp_path / "mine.jinja")).text == MARKED
        with pytest.raises(UserError, match=r"data.template=gone.jinja: cannot be read \(No such file.*chatml, plain"):
            chat_template(tokenizer, "gone.jinja")
        (tmp_path / "mine.jinja").write_text("{% for m in messages %}\n{{ m }")
        with pytest.raises(UserError, match=r"mine.jinja: is no jinja template \(line 2: .*\); mend it"):
            chat_template(tokenizer, str(tmp_path / "mine.jinja"))

    def test_tokens_that_are_missing(self, tmp_path: Path) -> None:
        tokenizer = tokenizer_in(tmp_path, special=("<|endoftext|>",))
        with pytest.raises(UserError, match=r"data.template=chatml: .* lacks the special tokens <\|im_start\|> and"):
            chat_template(tokenizer, "chatml")
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match="data.template=plain: .* names no eos_token, so nothing would end an answer"):
            chat_template(tokenizer, None)
