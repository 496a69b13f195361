"""Rows as token ids, and which of them the model learns to write. Torch-free.

An answer is parted from its prompt where evaluation parts them (see `train.evaluate.rows`): a token that reaches over the
border belongs to the answer. Targets are told by their place and never by their id, so that a padding token may be the same
as the end of documents. Shape letters: N tokens of a row.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.chat import ChatTemplate, Span, all_text, spelled_specials
from data_pipeline.records import BadRow, Fault
from data_pipeline.rows_config import RowsConfig, Targets
from data_pipeline.task_config import TaskConfig
from data_pipeline.tasks import Row
from data_pipeline.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedRow:
    """One row as the model reads it."""

    inputs_N: np.ndarray
    """int32: what the model reads."""
    labels_N: np.ndarray
    """int32: what it is to answer at each place; IGNORE where nothing is learned."""
    is_cut: bool
    """Whether something was left out so that the rest fits."""


IGNORE = -100  # as in data_pipeline.loader, which this module does not import: it must not need torch


@dataclass(frozen=True)
class Tokens:
    """A row before it is cut."""

    ids: list[int]
    flags: list[bool]
    """Whether each is a target."""
    head: int
    """Tokens at the beginning that are never cut off: the opening."""
    answer: int
    """Where the answer that matters most begins."""


@dataclass(frozen=True, kw_only=True)
class RowEncoder:
    """Encodes rows one way. What is wrong with one comes back as a BadRow."""

    tokenizer: Tokenizer
    kind: str
    """TaskConfig.kind."""
    targets: Targets
    """Not auto."""
    sequence_length: int
    """Most tokens that the model reads of a row."""
    opening: tuple[int, ...]
    """Ids before every row."""
    end_of_document: int
    """Id behind every answer."""
    no_answer: str
    """Text for a row without a truth."""
    system: str | None = None
    """First turn of a dialogue without one."""
    template: ChatTemplate | None = None
    """Of dialogues."""

    def encode(self, rows: Sequence[Row], labels: Sequence[str] = ()) -> list[EncodedRow | BadRow]:
        """Each of the rows. `labels`: those of a classification, in the order of their numbers."""
        if self.kind == "classification":
            numbers = {label: number for number, label in enumerate(labels)}
            found = self.tokenizer.encode_all([row.prompt for row in rows])
            return [self._labelled(row, ids, numbers) for row, ids in zip(rows, found, strict=True)]
        whole = zip(rows, self.tokens_of(rows), strict=True)
        return [made if isinstance(made, BadRow) else self.shifted(made, row) for row, made in whole]

    def tokens_of(self, rows: Sequence[Row]) -> list[Tokens | BadRow]:
        """Each of the rows, prompts and dialogues, uncut."""
        talks = iter(self._dialogues([row for row in rows if row.messages]))
        prompts = iter(self._prompts([row for row in rows if not row.messages]))
        return [next(talks if row.messages else prompts) for row in rows]

    def _prompts(self, rows: Sequence[Row]) -> list[Tokens | BadRow]:
        texts = [row.prompt + row.prefix + self.answer_of(row) for row in rows]
        alone = self.tokenizer.encode_all([row.prompt for row in rows])
        return [
            self._prompted(row, prompt, whole)
            for row, prompt, whole in zip(rows, alone, self.tokenizer.encode_all(texts), strict=True)
        ]

    def answer_of(self, row: Row) -> str:
        """What the model learns to write for a row: its first truth, or that there is none."""
        return row.truths[0] if row.truths else self.no_answer

    def with_system(self, row: Row) -> Row:
        """The row, with the system's first turn where a dialogue lacks one."""
        if self.system is None or not row.messages or row.messages[0]["role"] == "system":
            return row
        return replace(row, messages=({"role": "system", "content": self.system}, *row.messages))

    def asked(self, row: Row) -> str:
        """A dialogue's text up to where the assistant's last turn begins. Raises BadRow when the template fails."""
        assert self.template is not None, "dialogues have a template"
        messages = self.with_system(row).messages
        last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
        try:
            return self.template.render(messages[:last], tools=row.tools, generation_prompt=True)
        except BadRow as bad:
            raise BadRow(bad.fault, f"{row.id}: {bad}") from None

    @functools.cached_property
    def _specials(self) -> re.Pattern[str] | None:
        return spelled_specials(self.tokenizer)

    def _prompted(self, row: Row, alone: list[int], whole: list[int]) -> Tokens | BadRow:
        if not self.answer_of(row).strip():
            return BadRow(Fault.EMPTY, f"{row.id}: its answer is empty, so there is nothing to learn")
        place = next((at for at, (one, other) in enumerate(zip(alone, whole, strict=False)) if one != other), len(alone))
        place = min(place, len(whole))
        head = list(self.opening)
        if not head and not place:
            head = [self.end_of_document]  # as at evaluation: something must stand before the first token to predict
        ids = [*head, *whole, self.end_of_document]
        begin = len(head) + place
        learned = 1 if self.targets == "all" else begin
        flags = [at >= learned for at in range(len(ids))]
        return Tokens(ids=ids, flags=flags, head=len(head), answer=begin)

    def _labelled(self, row: Row, ids: list[int], numbers: dict[str, int]) -> EncodedRow | BadRow:
        if not row.prompt.strip() or not ids:  # a tokenizer may make nothing of signs that cannot be seen
            return BadRow(Fault.EMPTY, f"{row.id}: its text is empty")
        if row.truths[0] not in numbers:
            known = ", ".join(list(numbers)[:20])
            return BadRow(Fault.LABEL, f"{row.id}: label {row.truths[0]!r} is none of those to learn ({known})")
        room = self.sequence_length - len(self.opening)
        if room < 1:
            return BadRow(
                Fault.NO_TARGET, f"{row.id}: no token of it fits data.sequence_length={self.sequence_length}; raise that"
            )
        inputs_N = np.array([*self.opening, *ids[-room:]], dtype=np.int32)
        labels_N = np.full(len(inputs_N), IGNORE, dtype=np.int32)
        labels_N[-1] = numbers[row.truths[0]]
        return EncodedRow(inputs_N, labels_N, is_cut=len(ids) > room)

    def _dialogues(self, rows: Sequence[Row]) -> list[Tokens | BadRow]:
        written = [self._written(row) for row in rows]
        texts = [found[0] for found in written if not isinstance(found, BadRow)]
        backend = self.tokenizer.backend
        backend.encode_special_tokens = False
        try:
            encodings = iter(backend.encode_batch(texts, add_special_tokens=False))
        finally:
            backend.encode_special_tokens = True
        made: list[Tokens | BadRow] = []
        for row, found in zip(rows, written, strict=True):
            if isinstance(found, BadRow):
                made.append(found)
                continue
            encoding = next(encodings)
            made.append(self._answered(row, encoding.ids, encoding.offsets, found[1]))
        return made

    def _written(self, row: Row) -> tuple[str, list[Span]] | BadRow:
        assert self.template is not None, "dialogues have a template"
        row = self.with_system(row)
        forged = self._specials.search(all_text(row.messages, row.tools)) if self._specials else None
        if forged:
            text = f"{row.id}: its text spells the special token {forged[0]}, which would end or begin a turn; take it out"
            return BadRow(Fault.SPECIAL, text)
        try:
            if self.targets == "all":
                return self._all_written(row)
            last_only = self.targets == "last_turn" or row.answers == 1
            text, spans = self.template.render_marked(row.messages, tools=row.tools, last_only=last_only)
            return text, spans[-row.answers :]
        except BadRow as bad:
            return BadRow(bad.fault, f"{row.id}: {bad}")

    def _all_written(self, row: Row) -> tuple[str, list[Span]]:
        """The text, and its last answer, which is what is kept of a dialogue that is too long; none where it cannot be told."""
        assert self.template is not None, "dialogues have a template"
        text = self.template.render(row.messages, tools=row.tools)
        try:
            marked, spans = self.template.render_marked(row.messages, tools=row.tools, last_only=True)
        except BadRow:
            return text, []
        return text, spans if marked == text else []

    def _answered(self, row: Row, ids: list[int], offsets: Sequence[Span], spans: list[Span]) -> Tokens:
        flags = [False] * len(ids) if self.targets != "all" else [True] * len(ids)
        answer = 0
        firsts, lasts = [first for first, _ in offsets], [last for _, last in offsets]  # both in order
        for begin, end in spans:
            near = range(bisect_right(lasts, begin), bisect_right(firsts, end))
            inside = [at for at in near if _overlap(firsts[at], lasts[at], begin, end)]
            if not inside:
                continue
            answer = inside[0]
            for at in range(inside[0], self._end_of_turn(ids, inside[-1] + 1, inside[0]) + 1):
                flags[at] = True
        ids = list(ids)
        last_is_answer = row.messages[-1]["role"] == "assistant"
        if last_is_answer and not any(token in self.tokenizer.special_ids for token in ids[answer:]):
            ids.append(self.end_of_document)  # the template has no mark for the end of an answer, and the model must stop
            flags.append(True)
        if self.targets == "all" and not spans:
            answer = len(ids) - 1  # where the last answer begins is not clear, but it is at the end
        head = len(self.opening)
        if tuple(ids[:head]) != self.opening:
            ids, flags, answer = [*self.opening, *ids], [*[False] * head, *flags], answer + head
        return Tokens(ids=ids, flags=flags, head=head, answer=answer)

    def _end_of_turn(self, ids: Sequence[int], end: int, begin: int) -> int:
        """Last target of a turn of the tokens [begin, end): its end mark, which may be the next; not the blanks behind that."""
        special = self.tokenizer.special_ids
        if end < len(ids) and ids[end] in special and not any(token in special for token in ids[begin:end]):
            return end
        marks = [at for at in range(begin, end) if ids[at] in special]
        if marks and not self.tokenizer.decode(ids[marks[-1] + 1 : end]).strip():
            return marks[-1]
        return end - 1

    def shifted(self, tokens: Tokens, row: Row) -> EncodedRow | BadRow:
        """Inputs and the next token of each, cut to the length of a sequence."""
        ids, flags = list(tokens.ids), list(tokens.flags)
        over = len(ids) - (self.sequence_length + 1)
        if over > 0:
            # At least one token stays before the answer, for its first token to be predicted from.
            least = max(tokens.head, 1)
            from_left = min(over, max(0, tokens.answer - least))
            del ids[tokens.head : tokens.head + from_left], flags[tokens.head : tokens.head + from_left]
            del ids[self.sequence_length + 1 :], flags[self.sequence_length + 1 :]
        inputs_N = np.array(ids[:-1], dtype=np.int32)
        labels_N = np.where(np.array(flags[1:], dtype=bool), np.array(ids[1:], dtype=np.int32), np.int32(IGNORE))
        if not (labels_N != IGNORE).any():
            text = f"{row.id}: no target is left of it in data.sequence_length={self.sequence_length} tokens; raise that"
            return BadRow(Fault.NO_TARGET, text)
        return EncodedRow(inputs_N, labels_N.astype(np.int32), is_cut=over > 0)


def _overlap(first: int, last: int, begin: int, end: int) -> bool:
    """Whether a token's characters [first, last) lie in [begin, end), in part at least.

    Blanks that a tokenizer trims off its offsets leave a token without width at its own end.
    """
    return begin < last <= end if first == last else first < end and last > begin


def resolved_targets(task: TaskConfig, data: RowsConfig) -> Targets:
    """`data.targets` for this kind of task, auto resolved; nothing else but auto is of use for classification."""
    if data.targets != "auto":
        return data.targets
    return "assistant" if task.kind == "dialogue" else "completion"
