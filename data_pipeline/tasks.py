"""Labelled rows: of any file, each made a prompt and its truths, or a dialogue."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from conf.errors import UserError
from data_pipeline.dialogues import Message, dialogue_of, pair_of, text_pair_of, tools_of
from data_pipeline.layouts import ALIASES, MISSING, Layout, is_null, layout_of, lookup, names_of
from data_pipeline.records import BadRow, Fault, Record, RecordReader
from data_pipeline.task_config import TaskConfig, TaskSource
from data_pipeline.verified import KnownHashes

FIRST_ROWS = 100
"""Of these the first whose columns are known tells what the file's columns are."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One labelled row."""

    id: str
    """File and line or row number, from 1: the same for every model."""
    source: str
    """Name of its data."""
    prompt: str
    """What the model is given; of a dialogue the turns before the last answer, as its chat template writes them."""
    truths: tuple[str, ...]
    """What is right; none: there is no answer, by an empty list, or a null among answers to questions."""
    prefix: str = " "
    """What stands between the prompt and the truth."""
    messages: tuple[Message, ...] = ()
    """Of a dialogue: its turns, in the form that chat templates take."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Of a dialogue: the functions that the assistant may call, as JSON schemas."""
    answers: int = 0
    """Of a preference's dialogue: how many of the last turns of the assistant are the answer; those before are its prompt."""
    rejected: Row | None = None
    """Of a preference: the same prompt with the answer that is not preferred."""


def labelled_rows(
    task: TaskConfig,
    source: TaskSource,
    *,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Row | BadRow]:
    """The rows of one source, in order, with those that are of no use. `tell` is given what was found out of its columns.

    Raises UserError for a file that cannot be read, is of another format, or whose columns are not clear.
    """
    reader = RecordReader(format=task.format, columns=task.columns)
    records = reader.read(source)
    first: list[Record | BadRow] = []
    good: list[Record] = []
    for record in records:
        first.append(record)
        if isinstance(record, Record):
            good.append(record)
        if len(good) == FIRST_ROWS:
            break
    layout = _layout(task, good)
    if layout is None:
        yield from (record for record in first if isinstance(record, BadRow))
        return
    if layout.name and tell is not None:
        tell(f"{source.label}: rows of {layout.words()}")
    is_table = reader.kind_of(source) in ("csv", "tsv") and not task.columns
    maker = _RowMaker(task, source, layout, hint="; for a file without a header give task.columns=[...]" if is_table else "")
    for record in itertools.chain(first, records):
        try:
            yield record if isinstance(record, BadRow) else maker.row(record)
        except BadRow as bad:
            yield bad


def hash_of(source: TaskSource, *, format: str = "auto", hashes: KnownHashes | None = None) -> str:
    """SHA-256 of the source's files. Raises UserError when one cannot be read."""
    return RecordReader(format=format).hash_of(source, hashes or KnownHashes())


def _layout(task: TaskConfig, records: Sequence[Record]) -> Layout | None:
    """Of the first row that has one; None without rows. Raises UserError, with the first row's place, where none has."""
    wrong: UserError | None = None
    for record in records:
        try:
            return layout_of(task, record.values)
        except UserError as error:
            wrong = wrong or UserError(f"{record.id}: {error}")
    if wrong is not None:
        raise wrong
    return None


class _Filler(Formatter):
    """Fills the columns of a row into its prompt, where null would read `None`."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if isinstance(key, int):
            raise ValueError("a field has no name")
        return kwargs[key]

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        found = super().get_field(field_name, args, kwargs)
        if is_null(found[0]):
            raise ValueError(f"column {field_name} is null; leave the row out, or give it a text")
        return found


@dataclass(frozen=True)
class _RowMaker:
    """Makes rows of one source; what is wrong with one is raised as a BadRow."""

    task: TaskConfig
    source: TaskSource
    layout: Layout
    hint: str

    def row(self, record: Record) -> Row:
        if self.task.kind == "dialogue":
            made = self._dialogue(record)
        elif self.task.kind == "preference":
            made = self._pair(record)
        else:
            prompt, truths = self._prompt(record), self._truths(record)
            if self.task.kind == "classification":
                self._check_label(truths, record)
            made = Row(id=record.id, source=self.source.label, prompt=prompt, truths=truths, prefix=self.layout.prefix)
        try:
            both = (made, made.rejected or made)
            texts = [json.dumps([row.prompt, row.truths, row.messages], ensure_ascii=False) for row in both]
            "".join(texts).encode()
        except UnicodeEncodeError:
            text = f"{record.id}: holds half of a surrogate pair, which is no character; mend its escapes"
            raise BadRow(Fault.ENCODING, text) from None
        return made

    def _dialogue(self, record: Record) -> Row:
        try:
            messages = dialogue_of(self.layout, record.values)
            tools = tools_of(self.layout.get(record.values, "tools"))
        except BadRow as bad:
            raise BadRow(bad.fault, f"{record.id}: {bad}; there are {names_of(record.values)}") from None
        last = next(message for message in reversed(messages) if message["role"] == "assistant")
        return Row(
            id=record.id,
            source=self.source.label,
            prompt="",
            truths=(last["content"],),
            messages=tuple(messages),
            tools=tuple(tools),
        )

    def _pair(self, record: Record) -> Row:
        values, common = record.values, {"source": self.source.label, "prefix": self.layout.prefix}
        try:
            answers = [self.layout.get(values, name) for name in ("chosen", "rejected")]
            if None in answers:
                raise BadRow(Fault.EMPTY, f"{'chosen' if answers[0] is None else 'rejected'} is null")
            if all(isinstance(answer, str) and not answer.lstrip().startswith("[{") for answer in answers):
                prompt, chosen, rejected = text_pair_of(self.layout, values, *answers)
                if prompt is None:
                    prompt = self._prompt(record)
                made = [Row(id=record.id, prompt=prompt, truths=(text,), **common) for text in (chosen, rejected)]
            else:
                *pair, alike = pair_of(self.layout, values)
                common["tools"] = tuple(tools_of(self.layout.get(values, "tools")))
                made = [
                    Row(
                        id=record.id,
                        prompt="",
                        truths=(messages[-1]["content"],),
                        messages=tuple(messages),
                        answers=sum(message["role"] == "assistant" for message in messages[alike:]),
                        **common,
                    )
                    for messages in pair
                ]
        except BadRow as bad:
            text = str(bad) if str(bad).startswith(record.id) else f"{record.id}: {bad}; there are {names_of(values)}"
            raise BadRow(bad.fault, text) from None
        return replace(made[0], rejected=made[1])

    def _prompt(self, record: Record) -> str:
        values = record.values
        try:
            return _Filler().vformat(self.layout.prompt, (), self.layout.filled(values))
        except (KeyError, IndexError) as error:
            there = f"there are {names_of(values)}{self.hint}"
            text = f"{record.id}: task.prompt names {error}, which is no column; {there}"
            raise BadRow(Fault.COLUMN, text) from None
        except (ValueError, AttributeError, TypeError) as error:
            text = f"{record.id}: task.prompt cannot be filled in ({error}); a brace that means itself is doubled"
            raise BadRow(Fault.VALUE, text) from None

    def _truths(self, record: Record) -> tuple[str, ...]:
        path = self.layout.target
        found = lookup(record.values, path)
        if found is MISSING:
            there = f"there are {names_of(record.values)}"
            raise BadRow(Fault.COLUMN, f"{record.id}: task.target={path} is no column; {there}")
        if is_null(found) and self.task.kind == "generation" and not self._is_of_answers():
            way_out = "leave the row out, or give an empty list where there is no answer"
            raise BadRow(Fault.EMPTY, f"{record.id}: task.target={path} is null, which is no text to learn; {way_out}")
        several = [one for one in (found if isinstance(found, list | tuple) else [found]) if not is_null(one)]
        if any(isinstance(one, list | dict) for one in several):
            kind = type(several[0]).__name__
            text = f"{record.id}: task.target={path} holds {kind}, not text; name a field inside: {path}.text"
            raise BadRow(Fault.VALUE, text)
        return tuple(str(one) for one in several)

    def _is_of_answers(self) -> bool:
        """Whether the truths are answers to a question, which may have none; of a summary or a translation null is a gap."""
        names = {"answers", *ALIASES["answers"], self.layout.columns.get("answers", "answers")}
        return any(self.layout.target == name or self.layout.target.startswith(f"{name}.") for name in names)

    def _check_label(self, truths: tuple[str, ...], record: Record) -> None:
        task, path = self.task, self.layout.target
        if len(truths) != 1:
            text = f"{record.id}: column {path} holds {len(truths)} labels; a row has exactly one"
            raise BadRow(Fault.VALUE if truths else Fault.EMPTY, text)
        if task.labels and truths[0] not in task.labels:
            text = f"label {truths[0]!r} is not among task.labels=[{', '.join(task.labels)}]; add it, or mend the row"
            raise BadRow(Fault.LABEL, f"{record.id}: {text}")
        if not task.labels:
            found = lookup(record.values, path)
            if isinstance(found, float):
                text = f"{record.id}: column {path} holds {found}, a number with a fraction; labels are texts or whole numbers"
                raise BadRow(Fault.VALUE, text)
            if found in ("", -1):  # -1: how data sets mark the rows of a test whose labels are kept back
                raise BadRow(Fault.EMPTY, f"{record.id}: column {path} holds {found!r}, which is no label; leave the row out")
