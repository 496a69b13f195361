"""Chats from the command line: a small model learns short dialogues; it answers by pipe, at a terminal, in transformers."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import select
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.command import longhaul
from tests.timeouts import scaled
from tests.unit.convert.checkpoints import LLAMA, rewritten, write_checkpoint
from tests.unit.data_pipeline.labelled import json_lines, tokenizer_in
from train.checkpoint.manifest import file_facts

pytestmark = pytest.mark.further

MODEL = replace(LLAMA, vocab_size=304, max_positions=160)
ON_CPU = ("device=cpu", "dtype=fp32")
SYSTEM = "say it twice"
WORDS = ("one", "two", "three", "system", "answer", "words", "user")
COMMAND = [sys.executable, "-P", "-m", "tools.cli"]
LIMIT = scaled(120.0)


def base_in(folder: Path) -> Path:
    """A checkpoint of random weights whose tokenizer has the tokens of a chat."""
    checkpoint = write_checkpoint(folder / "base", MODEL)
    for path in (checkpoint / "tokenizer").iterdir():
        path.unlink()
    tokenizer_in(checkpoint / "tokenizer")
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json")
    rewritten(checkpoint, files={path.relative_to(checkpoint).as_posix(): asdict(file_facts(path)) for path in files})
    return checkpoint


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to say the word of the user twice."""
    folder = tmp_path_factory.mktemp("chat")
    choose = random.Random(3)
    rows = []
    for _ in range(400):
        asked = [choose.choice(WORDS) for _ in range(choose.randint(1, 3))]
        turns = [[{"role": "user", "content": word}, {"role": "assistant", "content": f"{word} {word}"}] for word in asked]
        rows.append({"messages": [message for turn in turns for message in turn]})
    data = json_lines(folder / "rows.jsonl", *rows)
    found = longhaul(
        "finetune", f"checkpoint={base_in(folder)}", "task=dialogue", f"task.data=[{{path: {data}}}]",
        "data.template=chatml", f"data.system={SYSTEM}", "data.sequence_length=128", "precision=fp32", "batch.sequences=8",
        "batch.micro_batch=8", "budget.epochs=null", "budget.steps=120", "optim.lr=5e-3", "evaluate.max_samples=0",
        "monitor=quiet", "launch.device=cpu", f"run.folder={folder}", "run.name=chat",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr + found.stdout
    return folder / "chat"


def test_what_training_said_lies_beside_the_tokenizer(run_dir: Path) -> None:
    tokenizer = next((run_dir / "checkpoints").iterdir()) / "tokenizer"
    assert "<|im_start|>" in (tokenizer / "chat_template.jinja").read_text()
    ends = json.loads((tokenizer / "generation_config.json").read_text())["eos_token_id"]
    assert len(ends) == 2, "the end of a turn, and that of a text"


def test_lines_of_a_pipe_are_turns(run_dir: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.jsonl"
    words = ["generate", f"checkpoint={run_dir}", "chat=true", "temperature=0", *ON_CPU, "max_new_tokens=20"]
    found = longhaul(*words, typed=f"one\nthree\n/save {saved}\n/reset\nsystem\n")
    assert (found.returncode, found.stdout) == (0, "one one\nthree three\nsystem system\n"), found.stderr
    assert "3 answers: " in found.stderr
    said = [message["content"] for message in json.loads(saved.read_text())["messages"]]
    assert said == [SYSTEM, "one", "one one", "three", "three three"], "the system's text is that of training"
    once = longhaul(*words, "prompt=two")
    assert (once.returncode, once.stdout) == (0, "two two\n"), once.stderr
    refused = longhaul(*(word for word in words if word != "chat=true"))
    assert refused.returncode == 93 and "standard input is no terminal, chat=true takes its lines" in refused.stderr


@pytest.mark.campaign(name="layouts")
def test_ranks_that_share_the_model_chat_as_one(run_dir: Path) -> None:
    words = ["generate", f"checkpoint={run_dir}", "chat=true", "temperature=0", *ON_CPU, "max_new_tokens=20", "tensor=2"]
    shared = longhaul(*words, typed="one\n/undo\nthree\n/reset\ntwo\n")
    assert (shared.returncode, shared.stdout) == (0, "one one\nthree three\ntwo two\n"), shared.stderr
    assert shared.stderr.count("taken back: one") == 1, "one rank speaks"


# Makes the terminal the controlling one, without a fork of the tests' own process, whose threads may hold locks at that moment;
# and hears Ctrl-C even where whoever runs the tests leaves it out, as nohup's shells do.
AT_A_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self._end, terminal = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", AT_A_TERMINAL, *COMMAND, *words],
            stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(terminal)
        self.seen = ""

    def until(self, pattern: str) -> str:
        """What is shown up to and with `pattern`, which is then behind."""
        deadline = time.monotonic() + LIMIT
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self._end], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} does not come: {self.seen}"
            try:
                piece = os.read(self._end, 4096)
            except OSError:  # the other side is closed
                piece = b""
            assert piece, f"it ended before {pattern!r}: {self.seen}"
            self.seen += piece.decode(errors="replace")
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def leave(self) -> int:
        """The exit code; what it still says is read, so that it need not wait for a reader."""
        while True:
            try:
                if not os.read(self._end, 4096):
                    break
            except OSError:
                break
        os.close(self._end)
        return self._process.wait()


def test_a_chat_at_a_terminal(run_dir: Path) -> None:
    chat = Terminal("generate", f"checkpoint={run_dir}", "temperature=0", *ON_CPU, "max_new_tokens=20")
    assert f"The system says: {SYSTEM}" in chat.until("> ")
    chat.type("one\n")
    chat.until("one one\r\n")
    chat.until("> ")
    chat.type("half a question\x03")
    chat.until(r"Ctrl-D ends the chat")
    chat.until("> ")
    chat.type("/what\n")
    chat.until("/what: is no command")
    chat.until("> ")
    chat.type("/undo\n")
    chat.until(r"taken back: one")
    chat.until("> ")
    chat.type("three\n")
    chat.until("three three\r\n")
    chat.until("> ")
    chat.type("\x04")
    chat.until("2 answers: ")
    assert chat.leave() == 0


def test_transformers_answers_the_same_from_the_export(run_dir: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "exported"
    exported = longhaul("export", f"checkpoint={run_dir}", f"out={out}")
    assert exported.returncode == 0, exported.stderr + exported.stdout
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    turn_end, end = (tokenizer.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|endoftext|>"))
    assert model.generation_config.eos_token_id == [turn_end, end]
    messages = [{"role": "system", "content": SYSTEM}]
    for word in ("one", "three"):
        messages.append({"role": "user", "content": word})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            made = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert made[-1] == turn_end, "it ends where training ended answers"
        messages.append({"role": "assistant", "content": tokenizer.decode(made, skip_special_tokens=True)})
        assert messages[-1]["content"] == f"{word} {word}"
    card = (out / "README.md").read_text()
    assert "fine-tuned to step 120" in card and "apply_chat_template" in card and f"the system said first: {SYSTEM}" in card
    report = json.loads((out / "conversion_report.json").read_text())
    assert "fine-tuned on rows" in json.dumps(report)


@pytest.mark.campaign(name="layouts")
def test_an_export_that_is_imported_again_chats_alike(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    exported = longhaul("export", f"checkpoint={run_dir}", f"out={out}")
    assert exported.returncode == 0, exported.stderr + exported.stdout
    imported = longhaul("import", f"hf={out}", f"out={tmp_path / 'imported'}")
    assert imported.returncode == 0, imported.stderr + imported.stdout
    back = longhaul(
        "generate", f"checkpoint={tmp_path / 'imported'}", "chat=true", f"system={SYSTEM}", "temperature=0", *ON_CPU,
        typed="one\nthree\n",
    )  # fmt: skip
    assert (back.returncode, back.stdout) == (0, "one one\nthree three\n"), back.stderr


def test_a_model_without_turns_says_what_to_do(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "plain", LLAMA)
    refused = longhaul("generate", f"checkpoint={tmp_path / 'plain'}", "chat=true", "device=cpu", typed="one\n")
    assert refused.returncode == 93
    assert "knows no turns; give prompt=TEXT for a text that it goes on with" in refused.stderr
