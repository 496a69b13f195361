"""A chat by lines: questions and commands come in, answers go out. The same on every rank of a model; the first one alone
reads and writes."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from conf.errors import UserError
from train.inference.chat import Dialogue
from train.parallel import ParallelContext

HELP = """\
/reset         begin anew
/system TEXT   what the system says first; without a text: nothing
/undo          take the last question and its answer back
/save FILE     write the dialogue as a row that task=dialogue trains on
/help          these lines
/quit          end, as Ctrl-D does
Ctrl-C stops an answer. A line that ends with \\ goes on in the next. A question that begins with / is written with two."""
ENDED = {
    "max_new_tokens": "cut off at max_new_tokens={limit}",
    "context": "cut off: the model's context is full",
    "stopped": "stopped",
}


class Lines:
    """Lines of the user, None at their end."""

    def __init__(self, source: TextIO, *, prompts: bool) -> None:
        """`prompts`: a person types them, and sees when it is their turn."""
        self._source = source
        self._prompts = prompts
        if prompts:
            with suppress(ImportError):
                import readline  # noqa: F401  (gives input() its arrow keys)

    def next(self) -> str | None:
        """A question or a command, its lines joined. Ctrl-C takes back what is typed. Raises UserError for bytes that are no
        text."""
        try:
            parts = [self._line("> ")]
            while parts[-1] is not None and parts[-1].endswith("\\"):
                parts[-1] = parts[-1][:-1]
                parts.append(self._line(". "))
        except KeyboardInterrupt:
            if not self._prompts:
                raise
            print("\n(Ctrl-D ends the chat)", file=sys.stderr)
            return ""
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: is not UTF-8 (byte {error.start})") from None
        return None if parts == [None] else "\n".join(part for part in parts if part is not None)

    def _line(self, prompt: str) -> str | None:
        if self._prompts and sys.stdout.isatty():
            try:
                line = input(prompt)
            except EOFError:
                print()
                return None
        else:
            if self._prompts:
                print(prompt, end="", file=sys.stderr, flush=True)
            line = self._source.readline()
            if not line:
                return None
        # Under LANG=C Python keeps bytes that are no ASCII as lone surrogates.
        return line.rstrip("\r\n").encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class ChatLoop:
    """Goes through the lines of a chat."""

    def __init__(
        self, dialogue: Dialogue, context: ParallelContext, *, output: TextIO, interactive: bool, live: bool = True
    ) -> None:
        """`interactive`: a person is there, so that what is wrong with a line is told and the chat goes on; `live`: answers
        are shown while they grow."""
        self.dialogue, self.context, self.tell = dialogue, context, dialogue.tell
        self._output, self._interactive, self._live = output, interactive, live
        if not context.is_first:  # Ctrl-C reaches all processes of a terminal: what it means is the first one's matter
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._system,
            "/undo": self._undo,
            "/save": self._save,
            "/help": lambda _: self.tell(HELP),
        }

    def run(self, lines: Lines) -> None:
        """Until the lines end, or /quit. Raises UserError for a line that cannot be done, where no person is there."""
        while (line := self.context.from_first(lines.next() if self.context.is_first else None)) is not None:
            line = str(line).strip()
            if line == "/quit":
                return
            try:
                self._do(line)
            except UserError as error:
                if not self._interactive:
                    raise
                self.tell(str(error))

    def ask(self, question: str) -> None:
        """Put one question and show the answer."""
        with _interruption(listens=self._interactive and self.context.is_first) as interrupted:
            heard = (lambda: bool(self.context.from_first(interrupted()))) if self._interactive else interrupted
            shown = self._show(self.dialogue.answer(question, stopped=heard))
        if self.context.is_first and (shown or self.dialogue.ending != "stopped"):
            self._output.write("\n")
            self._output.flush()
        if (words := ENDED.get(self.dialogue.ending)) is not None:
            self.tell(f"({words.format(limit=self.dialogue.answering.max_new_tokens)})")

    def _show(self, pieces: Iterator[str]) -> bool:
        held = []
        for piece in pieces:
            held.append(piece)
            if self._live and piece and self.context.is_first:
                self._output.write(piece)
                self._output.flush()
        if not self._live and self.context.is_first:
            self._output.write("".join(held))
        return any(held)

    def _do(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if line.startswith("//"):
            self.ask(line[1:])
        elif not line.startswith("/"):
            if line:
                self.ask(line)
        elif word in self._commands:
            self._commands[word](rest.strip())
        else:
            raise UserError(f"{word}: is no command; /help tells them, and // begins a question with /")

    def _reset(self, _: str) -> None:
        self.dialogue.reset()
        self.tell("(the dialogue begins anew)")

    def _system(self, text: str) -> None:
        self.dialogue.set_system(text)
        self.tell(f"(the system says: {text})" if text else "(the system says nothing)")

    def _undo(self, _: str) -> None:
        question = self.dialogue.undo()
        self.tell("(there is nothing to take back)" if question is None else f"(taken back: {question})")

    def _save(self, name: str) -> None:
        told = self._saved(name) if self.context.is_first else None
        told = self.context.from_first(told)
        if told is not None:
            raise UserError(str(told))
        self.tell(f"(saved: {name})")

    def _saved(self, name: str) -> str | None:
        """Write the dialogue; what is wrong, if anything is."""
        if not name:
            return "/save: needs the name of a file"
        if not self.dialogue.messages:
            return "/save: there is no turn yet"
        row = json.dumps({"messages": self.dialogue.transcript}, ensure_ascii=False)
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(row + "\n")
        except FileExistsError:
            return f"/save {name}: is there already; give another name"
        except OSError as error:
            return f"/save {name}: cannot be written ({error.strerror})"
        return None


@contextmanager
def _interruption(*, listens: bool) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed, which then does nothing else."""
    if not listens:
        yield lambda: False
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
