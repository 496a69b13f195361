"""A dialogue with a model: its turns, the ids that the chat template makes of them, the answers. Knows no terminal.

What was read once stays in the key-value cache: a turn runs the ids from where its text differs from what is held, which after
an answer is the end of it. Shapes: V vocabulary.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from conf.errors import UserError
from data_pipeline.chat import ChatTemplate, chat_template, own_template, spelled_specials
from data_pipeline.chat_files import end_ids
from data_pipeline.dialogues import Message
from data_pipeline.records import BadRow
from data_pipeline.tokenizer import Tokenizer
from train.config.finetune import FinetuneConfig
from train.inference.cached import CachedDecoder, KeyValueCache
from train.inference.generation import PREFILL_TOKENS, Continuation
from train.inference.sampling import Sampling, choose
from train.inference.text_model import TextModel
from train.model.init import keyed_seed

LEAST_ROOM = 512  # tokens that the first cache has room for; it grows by doubling, up to the model's context


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a model has learned to read and to end turns."""

    tokenizer: Tokenizer
    template: ChatTemplate
    opening: tuple[int, ...]
    """Ids before every dialogue, where the template does not write them itself."""
    ends: tuple[int, ...]
    """Ids at which an answer is complete."""
    known_ids: int
    """Ids that both the model and the tokenizer know."""
    system: str | None = None
    """What the system said first in its training."""

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """All that stands before the next answer. Raises UserError when the template does not take the messages."""
        try:
            text = self.template.render(messages, generation_prompt=True)
        except BadRow as error:
            raise UserError(str(error)) from None
        found = self.tokenizer.encode(text, special=True)
        begins = tuple(found[: len(self.opening)]) == self.opening
        return found if begins else [*self.opening, *found]

    @functools.cached_property
    def _specials(self) -> re.Pattern[str] | None:
        return spelled_specials(self.tokenizer)

    def forged(self, text: str) -> str | None:
        """The special token that a text spells: in a turn it would begin or end another."""
        found = self._specials.search(text) if self._specials else None
        return found[0] if found else None


def chat_format(text: TextModel, settings: object) -> ChatFormat:
    """How the model chats: by the template beside its tokenizer, or the one of its training, whose settings are given.

    Raises UserError for a model that knows no turns.
    """
    tokenizer = text.tokenizer
    tuned = settings if isinstance(settings, FinetuneConfig) and settings.task.kind in ("dialogue", "preference") else None
    if own_template(tokenizer) is not None:
        template = chat_template(tokenizer, None)
    elif tuned is not None and tuned.task.kind == "dialogue":
        template = chat_template(tokenizer, tuned.data.template)
    else:
        raise UserError(
            f"{tokenizer.folder}: holds no chat template, and the model has learned no dialogues, so it knows no turns; give "
            "prompt=TEXT for a text that it goes on with, or teach it first: longhaul finetune task=dialogue"
        )
    ends = (*text.endings, *end_ids(tokenizer), *_end_of_turn(template, tokenizer))
    return ChatFormat(
        tokenizer=tokenizer,
        template=template,
        opening=text.opening,
        ends=tuple(dict.fromkeys(ends)),
        known_ids=text.known_ids,
        system=tuned.data.system if tuned else None,
    )


def _end_of_turn(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special token that the template puts behind an answer; models from elsewhere do not always tell it."""
    said = "Said."
    try:
        text = template.render([{"role": "user", "content": "Asked."}, {"role": "assistant", "content": said}])
    except BadRow:
        return ()
    _, found, rest = text.rpartition(said)
    ids = tokenizer.encode(rest, special=True) if found else []
    return tuple(number for number in ids if number in tokenizer.special_ids)[:1]


class Reader:
    """A model and what it has read last."""

    def __init__(self, decoder: CachedDecoder) -> None:
        self.decoder = decoder
        self.num_run = 0
        """Positions that were run so far."""
        self._cache: KeyValueCache | None = None
        self._ids: list[int] = []
        self._stretch: tuple[bool, ...] = ()

    def read(self, ids: list[int], *, stopped: Callable[[], bool] = lambda: False) -> Tensor | None:
        """The logits [V] behind `ids`; of these, only what differs from what is held is run. None when `stopped` before."""
        held = self._held(ids)
        cache = self._room_for(len(ids), held)
        cache.length, self._ids, self._stretch = held, ids, self._stretched(len(ids))
        rest_1S = torch.tensor([self._ids[held:]], device=self.decoder.weight.device)
        for chunk_1S in rest_1S.split(PREFILL_TOKENS, dim=1):
            if stopped():
                return None
            hidden_1SH = self.decoder.advance(chunk_1S, cache, length=len(ids))
            self.num_run += chunk_1S.shape[1]
        return self.decoder.logits(hidden_1SH[:, -1:])[0, -1]

    def read_on(self, token: int) -> Tensor:
        """The logits [V] behind one id more."""
        logits_V = self.read([*self._ids, token])
        assert logits_V is not None, "nothing stops it"
        return logits_V

    def _held(self, ids: list[int]) -> int:
        """How many of the ids are held. The last one is run in any case: the next is told from it."""
        if self._cache is None or self._stretch != self._stretched(len(ids)):
            return 0
        held = self._ids[: self._cache.length]
        most = min(len(held), len(ids) - 1)
        if held[:most] == ids[:most]:  # as for every token of an answer
            return most
        return next((place for place in range(most) if held[place] != ids[place]), most)

    def _stretched(self, length: int) -> tuple[bool, ...]:
        """How all positions of a text of this length are rotated (longrope), without which none of them can be kept."""
        ropes = [rope for rope in self.decoder.rotary.frequencies if rope.scaling == "longrope"]
        return tuple(length > rope.original_max_positions for rope in ropes)

    def _room_for(self, length: int, held: int) -> KeyValueCache:
        cache = self._cache
        if cache is None or length > cache.capacity:
            most = self.decoder.model.max_positions
            capacity = min(most, max(length, LEAST_ROOM, 2 * (0 if cache is None else cache.capacity)))
            if cache is None or held == 0:
                self._cache = None  # before the new one is made: both together may be too much
                cache = self.decoder.new_cache(num_sequences=1, capacity=capacity)
            else:
                cache = cache.select(torch.zeros(1, dtype=torch.int64, device=self.decoder.weight.device), capacity=capacity)
            self._cache = cache
        return cache


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How answers are chosen, and how long they may be."""

    sampling: Sampling
    max_new_tokens: int
    seed: int = 0
    stop: tuple[str, ...] = ()


Ending = Literal["complete", "max_new_tokens", "context", "stopped"]


@dataclass
class Tally:
    """What a dialogue has cost."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Dialogue:
    """Turns of the user and the model, of which the model sees the newest that fit its context."""

    def __init__(
        self, reader: Reader, form: ChatFormat, answering: Answering, *, system: str | None, tell: Callable[[str], None]
    ) -> None:
        """`system`: what the system says first; None: nothing. `tell` hears of turns that no longer fit."""
        self.reader, self.form, self.answering = reader, form, answering
        self.tell = tell
        self.system = system
        self.messages: list[Message] = []
        """All turns, without the system's."""
        self.ending: Ending = "complete"
        """How the last answer ended."""
        self.tally = Tally()
        self._first = 0
        """The oldest of the messages that the model still sees."""
        self._asked = 0

    @property
    def transcript(self) -> list[Message]:
        """All turns, the system's first."""
        return [*self._opening(), *self.messages]

    def reset(self) -> None:
        """Begin anew; what the system says stays."""
        self.messages, self._first, self._asked = [], 0, 0

    def undo(self) -> str | None:
        """Take the last question and its answer back; the question, None where there is none."""
        if not self.messages:
            return None
        del self.messages[-1]
        question = self.messages.pop()
        self._first = min(self._first, len(self.messages))
        return str(question["content"])

    def set_system(self, text: str | None) -> None:
        """What the system says first from now on, None for nothing. Raises UserError for a text that spells a special token."""
        self._refuse_forged(text or "")
        self.system = text or None

    def answer(self, question: str, *, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The model's answer, piece by piece as it becomes certain; question and answer are kept when it has ended.

        An answer that is `stopped` is kept as far as it came. Raises UserError for a question that does not fit the context
        or spells a special token, and when the model gives no finite logits; the dialogue is then as before.
        """
        self._refuse_forged(question)
        asked = [*self.messages, {"role": "user", "content": question}]
        ids, self._first = self._fitting(asked)
        pieces: list[str] = []
        for piece in self._written(ids, stopped):
            pieces.append(piece)
            yield piece
        text = "".join(pieces)
        if self.ending == "stopped" and not text.strip():
            return
        if (forged := self.form.forged(text)) is not None:
            self.tell(f"the answer spells the special token {forged}, which would end a turn; this turn is not kept")
            return
        self.messages = [*asked, {"role": "assistant", "content": text}]

    def _written(self, ids: list[int], stopped: Callable[[], bool]) -> Iterator[str]:
        answering, started = self.answering, time.perf_counter()
        # A generator for each answer: another one to the same question, after `undo`, is another draw.
        generator = torch.Generator().manual_seed(keyed_seed(answering.seed, "sample", self._asked))
        self._asked += 1
        continuation = Continuation(self.form.tokenizer.stream(), stop=answering.stop, ends=self.form.ends)
        # The last new token is not run through the model.
        room = self.reader.decoder.model.max_positions - len(ids) + 1
        limit = min(answering.max_new_tokens, room)
        self.ending = "max_new_tokens" if limit == answering.max_new_tokens else "context"
        logits_V = self.reader.read(ids, stopped=stopped)
        if logits_V is not None and not torch.isfinite(logits_V.max()):
            raise UserError("the model's logits are not finite: its weights are damaged or it diverged in training")
        for number in range(limit):
            if logits_V is None or stopped():
                self.ending = "stopped"
                break
            uniform_1 = torch.rand((), generator=generator, dtype=torch.float64).unsqueeze(0).to(logits_V.device)
            token = int(choose(logits_V[None, : self.form.known_ids], uniform_1, answering.sampling))
            yield continuation.push(token)
            if continuation.finished:
                self.ending = "complete"
                break
            if number + 1 < limit:
                logits_V = self.reader.read_on(token)
        if not continuation.finished:
            yield continuation.finish()
        self.tally.answers += 1
        self.tally.tokens += continuation.num_tokens
        self.tally.seconds += time.perf_counter() - started

    def _fitting(self, messages: list[Message]) -> tuple[list[int], int]:
        """The ids of what the model is to see, and the first message of it: as many of the newest turns as leave room to
        answer."""
        context = self.reader.decoder.model.max_positions
        reserved = min(self.answering.max_new_tokens, max(1, context // 4))
        first = self._first
        while True:
            ids = self.form.ids([*self._opening(), *messages[first:]])
            if len(ids) + reserved - 1 <= context:
                break
            if first == len(messages) - 1:
                raise UserError(
                    f"this turn, with what stands before it, has {len(ids)} tokens, and the model's context is {context}, of "
                    f"which {reserved} are for the answer; say less"
                )
            first += 2  # a question and its answer
        if first > self._first:
            count = (first - self._first) // 2
            many = "question and its answer" if count == 1 else f"{count} questions and their answers"
            self.tell(f"the dialogue has outgrown the model's context of {context} tokens: the oldest {many} are left out")
        return ids, first

    def _opening(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _refuse_forged(self, text: str) -> None:
        if (forged := self.form.forged(text)) is not None:
            raise UserError(f"the text spells the special token {forged}, which would begin or end a turn; write it otherwise")
