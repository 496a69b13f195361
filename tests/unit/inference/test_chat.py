"""Dialogues: what is held need not be run again and changes nothing, what no longer fits is told, what is typed is done."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from conf.errors import UserError
from data_pipeline.chat import BUILT_IN
from data_pipeline.rows_config import RowsConfig
from data_pipeline.task_config import TaskConfig, TaskSource
from data_pipeline.tokenizer import Tokenizer
from tests.unit.convert.checkpoints import LLAMA, open_checkpoint
from tests.unit.data_pipeline.labelled import tokenizer_in
from train.config.finetune import FinetuneConfig
from train.config.model import RopeConfig
from train.config.training import EvaluateConfig, RunConfig
from train.inference.cached import CachedDecoder
from train.inference.chat import Answering, Dialogue, Reader, chat_format
from train.inference.chat_loop import ChatLoop, Lines
from train.inference.load import load_decoder
from train.inference.sampling import Sampling
from train.inference.text_model import TextModel
from train.parallel import single_process

MODEL = replace(LLAMA, vocab_size=304, max_positions=400)
LONGROPE = RopeConfig(
    scaling="longrope", original_max_positions=60, factor=4.0, short_factors=(1.0,) * 8, long_factors=(4.0,) * 8
)
QUESTIONS = ("what is it?", "one, two", "say three words")


class Chat:
    """A dialogue with a model of random weights, and all that it told."""

    def __init__(self, folder, model=MODEL, *, template="chatml", tokens=8, temperature=0.0, system=None):
        checkpoint = open_checkpoint(folder / "run", model)
        decoder = load_decoder(checkpoint, torch.float32, device=torch.device("cpu"))
        tokenizer = tokenizer_in(folder / "tokenizer", template=BUILT_IN[template])
        text = TextModel(model=model, tokenizer=tokenizer, opening=())
        self.form = chat_format(text, None)
        self.decoder = CachedDecoder(decoder, model)
        self.answering = Answering(sampling=Sampling(temperature=temperature), max_new_tokens=tokens, seed=5)
        self.told = []
        self.dialogue = self.another(system)

    def another(self, system=None):
        """The same model, which has read nothing."""
        return Dialogue(Reader(self.decoder), self.form, self.answering, system=system, tell=self.told.append)

    def say(self, question, **settings):
        return "".join(self.dialogue.answer(question, **settings))

    def loop(self, lines, *, interactive=False):
        """What a chat of these lines shows."""
        output = io.StringIO()
        loop = ChatLoop(self.dialogue, single_process("cpu"), output=output, interactive=interactive)
        loop.run(Lines(io.StringIO(lines), prompts=False))
        return output.getvalue()


@pytest.fixture
def chat(tmp_path):
    return Chat(tmp_path)


@pytest.mark.parametrize("rope", [MODEL.rope, LONGROPE], ids=["plain", "longrope"])
@pytest.mark.parametrize("window", [None, 24])
def test_turns_run_what_is_new_and_answer_as_if_all_were_run(tmp_path, rope, window):
    chat = Chat(tmp_path, replace(MODEL, rope=rope, window=window, family="custom"), temperature=0.7)
    reader = chat.dialogue.reader
    for number, question in enumerate(QUESTIONS):
        anew = chat.another()
        anew.messages, anew._asked = list(chat.dialogue.messages), number
        ids = chat.form.ids([*chat.dialogue.messages, {"role": "user", "content": question}])
        assert chat.say(question) == "".join(anew.answer(question))
        held = reader.read(ids)
        torch.testing.assert_close(held, Reader(chat.decoder).read(ids), rtol=1e-5, atol=1e-5)
    assert len(ids) > 60, "long enough to be rotated in another way"
    if rope is MODEL.rope:
        assert reader.num_run < len(ids) + 4 * 8 + 20, "nothing is run twice but the last of what is asked again"


def test_an_answer_is_in_the_cache_when_the_next_turn_comes(chat, monkeypatch):
    reader, tokenizer = chat.dialogue.reader, chat.form.tokenizer
    written = iter(tokenizer.encode("the answer of two words<|im_end|>", special=True))
    with monkeypatch.context() as patch:
        patch.setattr("train.inference.chat.choose", lambda *_: torch.tensor([next(written)]))
        assert chat.say(QUESTIONS[0]) == "the answer of two words"
    before = reader.num_run
    assert before == len(reader._ids), "of the first turn nothing was run twice"
    chat.dialogue.answering = replace(chat.answering, max_new_tokens=1)
    chat.say(QUESTIONS[1])
    new = tokenizer.encode(f"<|im_end|>\n<|im_start|>user\n{QUESTIONS[1]}<|im_end|>\n<|im_start|>assistant\n", special=True)
    assert reader.num_run - before == len(new)


def test_the_cache_grows_with_the_dialogue(tmp_path, monkeypatch):
    monkeypatch.setattr("train.inference.chat.LEAST_ROOM", 8)
    chat = Chat(tmp_path)
    said = [chat.say(question) for question in QUESTIONS]
    monkeypatch.setattr("train.inference.chat.LEAST_ROOM", 400)
    chat.dialogue = chat.another()
    assert [chat.say(question) for question in QUESTIONS] == said


def test_chunks_of_a_long_question_change_nothing(chat, monkeypatch):
    whole = chat.say(QUESTIONS[0])
    monkeypatch.setattr("train.inference.chat.PREFILL_TOKENS", 5)
    chat.dialogue = chat.another()
    assert chat.say(QUESTIONS[0]) == whole


def test_the_oldest_turns_are_left_out_and_that_is_told(tmp_path):
    chat = Chat(tmp_path, replace(MODEL, max_positions=150), system="be kind")
    for number in range(6):
        chat.say(f"question {number}")
    assert "outgrown the model's context of 150 tokens: the oldest" in chat.told[0]
    assert chat.dialogue.transcript[0] == {"role": "system", "content": "be kind"}
    assert len(chat.dialogue.messages) == 12, "the dialogue is whole, the model sees its end"
    seen = chat.form.ids([chat.dialogue.transcript[0], *chat.dialogue.messages[chat.dialogue._first :]])
    assert len(seen) <= 150
    with pytest.raises(UserError, match="this turn, with what stands before it, has .* and the model's context is 150"):
        chat.say("a long question " * 30)
    assert len(chat.dialogue.messages) == 12


def test_an_answer_ends_where_the_context_does(tmp_path):
    chat = Chat(tmp_path, replace(MODEL, max_positions=90), tokens=100, temperature=1.0)
    chat.form = replace(chat.form, ends=())
    chat.dialogue = chat.another()
    chat.say("one")
    assert chat.dialogue.ending == "context"
    assert len(chat.dialogue.reader._ids) == 90


def test_answers_end_at_every_id_that_ends_turns(chat):
    special = chat.form.tokenizer.backend.token_to_id
    assert set(chat.form.ends) == {special("<|im_end|>"), special("<|endoftext|>")}, "of the template and of the tokenizer"
    first = int(chat.dialogue.reader.read(chat.form.ids([{"role": "user", "content": "one"}]))[:304].argmax())
    chat.form = replace(chat.form, ends=(first,))
    chat.dialogue = chat.another()
    assert chat.say("one") == ""
    assert (chat.dialogue.ending, chat.dialogue.tally.tokens) == ("complete", 1)


def test_the_ids_are_those_of_training(tmp_path):
    from data_pipeline.row_encoding import RowEncoder
    from data_pipeline.tasks import Row

    chat = Chat(tmp_path)
    opening = (chat.form.tokenizer.backend.token_to_id("<s>"),)
    messages = (*({"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}) * 2,)
    encoder = RowEncoder(
        tokenizer=chat.form.tokenizer, kind="dialogue", targets="assistant", sequence_length=64, opening=opening,
        end_of_document=0, no_answer="", template=chat.form.template,
    )  # fmt: skip
    (row,) = encoder.encode([Row(id="1", source="rows", prompt="", truths=(), messages=messages)])
    found = replace(chat.form, opening=opening).ids(messages[:3])
    assert row.inputs_N[: len(found)].tolist() == found


def test_a_text_that_spells_a_special_token_is_refused(chat):
    with pytest.raises(UserError, match=r"spells the special token <\|im_end\|>"):
        chat.say("end it <|im_end|> now")
    with pytest.raises(UserError, match="special token <s>"):
        chat.dialogue.set_system("a <s>")
    assert chat.dialogue.transcript == []


def test_an_answer_that_spells_a_special_token_is_not_kept(chat, monkeypatch):
    monkeypatch.setattr(Dialogue, "_written", lambda *_: iter(["so: <|im_", "end|>"]))
    assert chat.say("one") == "so: <|im_end|>"
    assert chat.dialogue.messages == []
    assert "spells the special token <|im_end|>" in chat.told[0]


def test_another_draw_after_undo_and_the_same_after_reset(tmp_path):
    chat = Chat(tmp_path, temperature=1.0)
    first = chat.say("one")
    assert chat.dialogue.undo() == "one"
    assert chat.dialogue.undo() is None
    assert chat.say("one") != first
    chat.dialogue.reset()
    assert chat.say("one") == first


def test_a_stopped_answer_is_kept_as_far_as_it_came(chat):
    whole = chat.say("one")
    chat.dialogue.reset()
    asked = iter([False] * 5)
    part = chat.say("one", stopped=lambda: next(asked, True))
    assert part and whole.startswith(part) and part != whole
    assert chat.dialogue.messages[-1] == {"role": "assistant", "content": part}
    chat.dialogue.reset()
    assert chat.say("two", stopped=lambda: True) == ""
    assert chat.dialogue.messages == []


def test_a_model_that_knows_no_turns(tmp_path):
    tokenizer = tokenizer_in(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="knows no turns; give prompt=TEXT"):
        chat_format(TextModel(model=MODEL, tokenizer=tokenizer, opening=()), None)


@pytest.mark.parametrize("kind", ["dialogue", "preference"])
def test_what_the_system_said_in_training_is_said_again(tmp_path, kind):
    tokenizer = tokenizer_in(tmp_path / "tokenizer", template=BUILT_IN["chatml"])
    settings = FinetuneConfig(
        run=RunConfig(name="tuned"),
        model=MODEL,
        initial_checkpoint="base",
        task=TaskConfig(kind=kind, data=(TaskSource(path="rows.jsonl"),)),
        data=RowsConfig(sequence_length=64, system="Be kind."),
        evaluate=EvaluateConfig(probes=()),
    )
    assert chat_format(TextModel(model=MODEL, tokenizer=tokenizer, opening=()), settings).system == "Be kind."


def test_a_template_that_refuses_what_is_said(tmp_path):
    chat = Chat(tmp_path)
    template = "{{ raise_exception('no system here') if messages[0]['role'] == 'system' }}{{ messages[-1]['content'] }}"
    (chat.form.tokenizer.folder / "chat_template.jinja").write_text(template)
    text = TextModel(model=MODEL, tokenizer=Tokenizer(chat.form.tokenizer.folder), opening=())
    chat.form = chat_format(text, None)
    assert chat.form.ends == (0,)
    chat.dialogue = chat.another("be kind")
    with pytest.raises(UserError, match="does not take it: no system here"):
        chat.say("one")


def test_damaged_weights(chat):
    chat.decoder.blocks[0].attention.output.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        chat.say("one")


def test_the_lines_of_a_pipe(chat, tmp_path):
    expected = [chat.say("one"), chat.say("/two\nthree")]
    chat.dialogue.reset()
    saved = tmp_path / "saved.jsonl"
    lines = f"one\n\n//two\\\nthree\n/save {saved}\n/undo\n/undo\n/undo\n/system Be kind.\n/help\n/reset\n/quit\nnever read\n"
    assert chat.loop(lines) == "".join(f"{answer}\n" for answer in expected)
    row = json.loads(saved.read_text())
    assert [message["content"] for message in row["messages"]] == ["one", expected[0], "/two\nthree", expected[1]]
    words = "\n".join(chat.told)
    for told in ("max_new_tokens=8", f"saved: {saved}", "taken back: one", "nothing to take back", "Be kind.", "/undo "):
        assert told in words
    assert chat.dialogue.transcript == [{"role": "system", "content": "Be kind."}]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/what", "/what: is no command; /help tells them"),
        ("/save", "/save: needs the name of a file"),
        ("/save x", "/save: there is no turn yet"),
        ("one\n/save {here}", "is there already"),
        ("one\n/save {here}/nothing/x", "cannot be written"),
        ("<|im_end|>", "spells the special token"),
    ],
)
def test_a_line_that_cannot_be_done_is_told_to_a_person_and_ends_a_script(chat, tmp_path, line, told):
    line = line.format(here=tmp_path)
    assert chat.loop(f"{line}\none\n", interactive=True).count("\n") >= 1
    assert any(told in words for words in chat.told)
    chat.dialogue.reset()
    with pytest.raises(UserError, match=told):
        chat.loop(f"{line}\n")


def test_control_c_stops_an_answer_and_not_the_chat(chat):
    class Output(io.StringIO):
        def write(self, text):
            if not self.getvalue():
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    output = Output()
    loop = ChatLoop(chat.dialogue, single_process("cpu"), output=output, interactive=True)
    before = signal.getsignal(signal.SIGINT)
    loop.run(Lines(io.StringIO("one\ntwo\n"), prompts=False))
    assert signal.getsignal(signal.SIGINT) is before
    assert chat.told[0] == "(stopped)"
    first, second = (message["content"] for message in chat.dialogue.messages[1::2])
    assert len(first) < len(second)
    assert output.getvalue() == f"{first}\n{second}\n"


def test_lines_that_are_no_text():
    with pytest.raises(UserError, match="is not UTF-8"):
        Lines(io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"), prompts=False).next()
    under_c = io.TextIOWrapper(io.BytesIO(b"na\xc3\xafve \xff\n"), encoding="ascii", errors="surrogateescape")
    assert Lines(under_c, prompts=False).next() == "na\u00efve \ufffd"


def test_answers_that_are_shown_when_they_are_whole(chat):
    expected = chat.say("one")
    chat.dialogue.reset()
    output = io.StringIO()
    ChatLoop(chat.dialogue, single_process("cpu"), output=output, interactive=False, live=False).ask("one")
    assert output.getvalue() == f"{expected}\n"
