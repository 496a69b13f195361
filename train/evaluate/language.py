"""How likely a model finds texts: a window moves over each document, and every target is scored once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from conf.errors import UserError
from data_pipeline.task_config import TaskConfig
from data_pipeline.texts import TextSource, TokenRun
from train.evaluate.subject import Subject
from train.inference.likelihood import LikelihoodRequest, LikelihoodScorer
from train.scores.record import Example

FEW_DOCUMENTS = 30
BLOCK_TARGETS = 1024
"""Of fewer documents than FEW_DOCUMENTS there is no telling how much documents differ: they count in blocks of this size,
long enough that one has little to do with the next."""
AT_ONCE = 4096
"""Windows that wait for their scores together: bounds the memory, and is plenty for batches of one length."""
SHOWN_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class Window:
    """Targets tokens[first:end] of a document, read from tokens[start] on."""

    start: int
    first: int
    end: int

    @property
    def num_targets(self) -> int:
        """Tokens that are scored."""
        return self.end - self.first


def windows(num_tokens: int, *, first: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that hold each of the targets first..num_tokens once; the model reads at most `context` tokens in each.

    All but the first window's targets see at least context + 1 - stride tokens before them. With stride = context they are
    the windows of lm-eval's rolling log-likelihood.
    """
    scored = first
    while scored < num_tokens:
        end = min(num_tokens, context + 1 if scored == first else scored + stride)
        yield Window(start=max(0, end - context - 1), first=scored, end=end)
        scored = end


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far the model looks."""

    context: int
    stride: int


def reach_of(task: TaskConfig, subject: Subject) -> Reach:
    """Context and stride as given, or as they follow from the model.

    Raises UserError for a context that the model does not have.
    """
    trained = subject.run.data.sequence_length if subject.run is not None else subject.model.max_positions
    context = task.context or min(trained, subject.model.max_positions)
    if context > subject.model.max_positions:
        raise UserError(
            f"task.context={context}: the model reads at most {subject.model.max_positions} tokens; give no more than that"
        )
    stride = task.stride or max(1, context // 2)
    if stride > context:
        raise UserError(f"task.stride={stride}: must not exceed the context of {context}, or tokens would be left out")
    return Reach(context=context, stride=stride)


@dataclass(kw_only=True)
class Piece:
    """Some windows of a document that count as one example."""

    run: TokenRun
    block: str
    """Which part of its document it is, by bytes of text; '' where it is all of it."""
    windows: list[Window]
    loss: float = 0.0

    @property
    def num_targets(self) -> int:
        """Targets of all its windows."""
        return sum(window.num_targets for window in self.windows)


def cut_texts(sources: Sequence[TextSource], subject: Subject, *, reach: Reach, limit: int | None) -> list[Piece]:
    """Read all documents and lay the windows over them; documents without a target have none.

    Raises UserError when a source has no target at all, or an id that the model does not know, and for a tokenizer whose
    tokens have no bytes to count.
    """
    token_bytes_V, opening = subject.bytes_of_ids(), max(1, len(subject.opening))
    found: list[Piece] = []
    for source in sources:
        runs = [_opened(run, subject) for run in source.runs(limit)]
        few = len(runs) < FEW_DOCUMENTS
        pieces = [piece for run in runs for piece in _pieces(run, token_bytes_V, opening, reach, few=few)]
        if not pieces:
            raise UserError(
                f"{source.path}: holds no token with another before it, so nothing can be predicted; give more text"
            )
        found += pieces
    return found


def measure_texts(
    pieces: Sequence[Piece], subject: Subject, scorer: LikelihoodScorer, *, progress: Callable[[int], None]
) -> list[Example]:
    """One example for each piece; `progress` is told the targets that are scored."""
    waiting = [(piece, window) for piece in pieces for window in piece.windows]
    for start in range(0, len(waiting), AT_ONCE):
        part = waiting[start : start + AT_ONCE]
        requests = [
            LikelihoodRequest(
                context=piece.run.tokens[window.start : window.first].tolist(),
                continuation=piece.run.tokens[window.first : window.end].tolist(),
            )
            for piece, window in part
        ]
        mean_targets = sum(window.num_targets for _, window in part) / len(part)
        likelihoods = scorer.score(requests, progress=lambda done: progress(round(done * mean_targets)))  # noqa: B023
        for (piece, _), likelihood in zip(part, likelihoods, strict=True):
            piece.loss += likelihood.loss
    token_bytes_V = subject.bytes_of_ids()
    return [_example(piece, subject, token_bytes_V) for piece in pieces]


def _opened(run: TokenRun, subject: Subject) -> TokenRun:
    if len(run.tokens) and run.tokens.max() >= subject.model.vocab_size:
        raise UserError(f"{run.id}: token id {run.tokens.max()} is beyond the model's vocabulary of {subject.model.vocab_size}")
    tokens = np.concatenate((np.array(subject.opening, dtype=np.int32), run.tokens))
    return TokenRun(id=run.id, source=run.source, tokens=tokens)


def _pieces(run: TokenRun, token_bytes_V: np.ndarray, first: int, reach: Reach, *, few: bool) -> Iterator[Piece]:
    every = list(windows(len(run.tokens), first=first, context=reach.context, stride=reach.stride))
    if not few:
        if every:
            yield Piece(run=run, block="", windows=every)
        return
    ends = np.cumsum(token_bytes_V[run.tokens], dtype=np.int64)  # of each token, in bytes of text
    held: list[Window] = []
    for window in every:
        held.append(window)
        if sum(one.num_targets for one in held) >= BLOCK_TARGETS or window is every[-1]:
            # Under another stride or tokenizer another part, so it must not go by the same name.
            part = f"@{ends[held[0].first - 1]}-{ends[held[-1].end - 1]}"
            yield Piece(run=run, block=part, windows=held)
            held = []


def _example(piece: Piece, subject: Subject, token_bytes_V: np.ndarray) -> Example:
    first, end = piece.windows[0].first, piece.windows[-1].end
    targets = piece.run.tokens[first:end]
    return Example(
        id=f"{piece.run.id}{piece.block}",
        source=piece.run.source,
        input=subject.tokenizer.decode(targets[:100].tolist())[:SHOWN_CHARACTERS],
        loss=piece.loss,
        input_tokens=sum(window.end - window.start - 1 for window in piece.windows),
        target_tokens=len(targets),
        target_bytes=int(token_bytes_V[targets].sum(dtype=np.int64)),
        scores={"loss": piece.loss / len(targets)},
    )
