"""Labelled rows: the likeliest label of each, or what the model writes for it, and how likely it finds the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from conf.errors import UserError
from data_pipeline.task_config import TaskConfig
from data_pipeline.tasks import Row
from train.evaluate.engines import Engines
from train.inference.batched import Prompt
from train.inference.generation import Continuation
from train.inference.likelihood import Likelihood, LikelihoodRequest, LikelihoodScorer
from train.inference.text_model import TextModel
from train.scores.record import Example

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A prompt and a text behind it as tokens that belong together."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    num_bytes: int
    """UTF-8 bytes of what is scored: the text, and what a token that reaches over the border has of the prompt."""
    is_cut: bool
    """Whether the beginning of the prompt, behind the opening, was left out, so that the rest fits the model."""

    @property
    def request(self) -> LikelihoodRequest:
        """How likely the text is."""
        return LikelihoodRequest(context=self.context, continuation=self.continuation)


def encode_pairs(subject: TextModel, prompt: str, texts: Sequence[str]) -> list[Encoded]:
    """Tokens of `prompt + text` for each text, parted where the first of them begins to differ from those of the prompt alone.

    So a token that reaches over the border counts as part of the text, and all texts stand behind the same context, as
    much of it as leaves room for the longest. Raises UserError for a text longer than the model reads, or that is no token.
    """
    alone = subject.tokenizer.encode(prompt)
    wholes = [subject.tokenizer.encode(prompt + text) for text in texts]
    place = min((_common(whole, alone) for whole in wholes), default=0)
    opened = (*subject.opening, *alone[:place]) or subject.first
    longest = 0
    for text, whole in zip(texts, wholes, strict=True):
        count = len(whole) - place
        if count < 1:
            raise UserError(f"{text!r}: is no token behind {prompt[-40:]!r}; give text of at least one")
        if count > subject.model.max_positions:
            raise UserError(f"{text[:40]!r}...: has {count} tokens, the model reads {subject.model.max_positions}")
        longest = max(longest, count)
    context = cut_prompt(opened, subject.model.max_positions + 1 - longest, opening=subject.opening)
    over = sum(len(subject.tokenizer.token_table[token_id]) for token_id in alone[place:])
    return [
        Encoded(
            context=context,
            continuation=tuple(whole[place:]),
            num_bytes=len(text.encode()) + over,
            is_cut=len(context) < len(opened),
        )
        for text, whole in zip(texts, wholes, strict=True)
    ]


def cut_prompt(ids: tuple[int, ...], room: int, *, opening: Sequence[int]) -> tuple[int, ...]:
    """At most `room` tokens of a prompt: its end, behind the opening, which stays as in training."""
    kept = min(len(opening), room)
    return ids if len(ids) <= room else (*ids[:kept], *ids[len(ids) - room + kept :])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    both = min(len(first), len(second))
    return next((place for place in range(both) if first[place] != second[place]), both)


def encode_rows(rows: Sequence[Row], task: TaskConfig, subject: TextModel) -> list[list[Encoded]]:
    """What is scored of each row: the text of every label; of a generation the first truth, where there is one; of a dialogue
    nothing.

    Raises UserError, with its place, for a row that does not fit the model or the metrics, and where no prompt fits.
    """
    if task.kind != "classification":
        _room_for_prompt(task, subject)
    if task.kind == "dialogue":
        return [[] for _ in rows]
    needs_truth = task.kind == "generation" and set(task.metrics) - {"answers"}

    def encode(row: Row) -> list[Encoded]:
        texts = task.texts_of_labels
        if task.kind != "classification":
            texts = (f"{row.prefix}{row.truths[0]}",) if any(row.truths[:1]) else ()
        if needs_truth and not row.truths:
            raise UserError(
                f"{row.id}: task.target={task.target} is empty, and {', '.join(sorted(needs_truth))} compare with a reference; "
                "leave the row out, or score it by task.metrics=[answers]"
            )
        try:
            return encode_pairs(subject, row.prompt, texts)
        except UserError as error:
            raise UserError(f"{row.id}: {error}") from None

    return [encode(row) for row in rows]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The examples, and how many prompts were too long."""

    examples: list[Example]
    cut_off: int


def label_rows(
    rows: Sequence[Row],
    pairs: Sequence[Sequence[Encoded]],
    task: TaskConfig,
    scorer: LikelihoodScorer,
    *,
    progress: Progress,
) -> Outcome:
    """Choose for each row the label whose text is the likeliest behind the prompt; `pairs` as of `encode_rows`."""
    flat = scorer.score([pair.request for row in pairs for pair in row], progress=progress)
    count = len(task.labels)
    examples = []
    for number, (row, encoded) in enumerate(zip(rows, pairs, strict=True)):
        likelihoods = flat[number * count : (number + 1) * count]
        scores = [
            -_comparable(task, text, pair, one)
            for text, pair, one in zip(task.texts_of_labels, encoded, likelihoods, strict=True)
        ]
        weights = np.exp(np.array(scores) - max(scores))
        probabilities = (weights / weights.sum()).tolist()
        truth = task.labels.index(row.truths[0])
        examples.append(
            Example(
                id=row.id,
                source=row.source,
                input=row.prompt,
                truths=row.truths,
                output=task.labels[int(np.argmax(scores))],
                probabilities=dict(zip(task.labels, probabilities, strict=True)),
                loss=likelihoods[truth].loss,
                input_tokens=len(encoded[truth].context),
                target_tokens=len(encoded[truth].continuation),
                target_bytes=encoded[truth].num_bytes,
            )
        )
    return Outcome(examples=examples, cut_off=sum(of_row[0].is_cut for of_row in pairs))


def _comparable(task: TaskConfig, text: str, pair: Encoded, likelihood: Likelihood) -> float:
    if task.label_scores == "mean_per_token":
        return likelihood.loss / len(pair.continuation)
    if task.label_scores == "mean_per_byte":
        return likelihood.loss / len(text.encode())
    return likelihood.loss


def _room_for_prompt(task: TaskConfig, subject: TextModel) -> int:
    """Tokens that a prompt may have. Raises UserError where there is none."""
    most = subject.model.max_positions + 1 - task.max_new_tokens
    if most < 1:
        raise UserError(
            f"task.max_new_tokens={task.max_new_tokens}: leaves no room for a prompt, as the model reads "
            f"{subject.model.max_positions} tokens; give less"
        )
    return most


def write_rows(
    rows: Sequence[Row],
    pairs: Sequence[Sequence[Encoded]],
    task: TaskConfig,
    subject: TextModel,
    *,
    engines: Engines,
    progress: Progress,
) -> Outcome:
    """Let the model write behind each prompt, the likeliest token at a time; and score the first truth in that place.

    `pairs` as of `encode_rows`.
    """
    most = _room_for_prompt(task, subject)
    contexts = [_context(row, subject) for row in rows]
    kept = [cut_prompt(context, most, opening=subject.opening) for context in contexts]
    prompts = [Prompt(ids=ids, max_new_tokens=task.max_new_tokens) for ids in kept]

    def watch(_: int) -> Continuation:
        stream = subject.tokenizer.stream()
        return Continuation(stream, stop=task.stop_texts, ends=subject.ends)

    outputs = engines.generator.generate(prompts, watch, progress=progress)
    scored = iter(engines.scorer.score([pair.request for row in pairs for pair in row]))
    examples = []
    for row, context, ids, of_row in zip(rows, contexts, outputs, pairs, strict=True):
        pair = next(iter(of_row), None)
        likelihood = None if pair is None else next(scored)
        examples.append(
            Example(
                id=row.id,
                source=row.source,
                input=row.prompt,
                truths=row.truths,
                output=_answer(text_until(subject.tokenizer.decode(ids), task.stop_texts).strip(), task),
                loss=None if likelihood is None else likelihood.loss,
                input_tokens=min(len(context), most),
                target_tokens=0 if pair is None else len(pair.continuation),
                target_bytes=0 if pair is None else pair.num_bytes,
                output_tokens=len(ids),
            )
        )
    return Outcome(examples=examples, cut_off=sum(len(context) > most for context in contexts))


def _answer(text: str, task: TaskConfig) -> str:
    """What counts as the answer: that there is none, said in the words that a model has learned for it, is an empty one."""
    return "" if "answers" in task.metrics and text == task.no_answer else text


def _context(row: Row, subject: TextModel) -> tuple[int, ...]:
    """Ids of a prompt; that of a dialogue was written by a template, with special tokens, and may have the opening already."""
    ids = tuple(subject.tokenizer.encode(row.prompt, special=bool(row.messages)))
    opened = row.messages and ids[: len(subject.opening)] == subject.opening
    return (ids if opened else (*subject.opening, *ids)) or subject.first


def text_until(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop in it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
