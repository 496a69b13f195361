"""The tasks: their sequences, what is asked about them, and what an answer is worth. The engine has the answers.

A task is the same at every evaluation and in every layout: its items follow from SEED, the tokenizer, the frequent tokens of
the held-out text and the length of the run's sequences.

Shapes: V ids of the model, N sequences, S tokens of one, P questions, O token ids whose probability is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conf.errors import UserError
from data_pipeline.tokenizer import Tokenizer
from train.config.training import ProbeName
from train.probes.snippets import CLOSERS, DEPTHS, draw_snippet

SEED = 20220924
MOST_IDS, FEWEST_IDS = 1024, 16
"""Random tokens are drawn from so many, the most frequent ones: a model cannot repeat what it has hardly ever seen."""
LONGEST, SHORTEST = 128, 8
"""Tokens of an item: one of a whole long context would cost as much as an evaluation."""
COPIES, REPEATS, SNIPPETS = 32, 96, 12
"""Sequences to copy; sequences with a repeated token; snippets of every kind and depth of bracket."""
TRIES = 400  # to draw as many snippets that fit
CHANCE: dict[ProbeName, float] = {"copying": 0.0, "induction": 0.0, "brackets": 1 / len(CLOSERS)}
"""Share of right answers without any knowledge; one in the size of the vocabulary counts as 0."""


Encode = Callable[[str], list[int]]


class NotAvailable(Exception):
    """A probe cannot be had with this tokenizer or this length, and why."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A task: sequences, and behind some of their tokens the question what comes next."""

    name: ProbeName
    tokens_NS: np.ndarray
    """int64; what lies behind the last question of a sequence is padding."""
    sequence_P: np.ndarray
    """int64: the sequence that a question belongs to."""
    place_P: np.ndarray
    """int64: the token of the sequence behind which it is asked."""
    first_place_P: np.ndarray | None = None
    """int64: the token behind which the same id was right for the first time, when nothing could tell; None: there is none."""
    options_PO: np.ndarray
    """int64: ids whose probability is asked for."""
    group_PO: np.ndarray | None = None
    """int64: the answer that an option belongs to, 0 the right one, which must be likelier than each of the others. None: the
    one option is the right id, and must be the likeliest of the whole vocabulary."""

    def score(self, log_probability_PO: np.ndarray, likeliest_P: np.ndarray) -> np.ndarray:
        """[P] 1 where the answer is right, given the logarithms of the options' probabilities and the likeliest id."""
        if self.group_PO is None:
            return (likeliest_P == self.options_PO[:, 0]).astype(np.float64)
        share_PO = np.exp(log_probability_PO - log_probability_PO.max(axis=1, keepdims=True))
        share_PG = np.stack([(share_PO * (self.group_PO == group)).sum(axis=1) for group in range(len(CLOSERS))], axis=1)
        return (share_PG[:, 0] > share_PG[:, 1:].max(axis=1)).astype(np.float64)

    def of(self, first: int, last: int) -> Probe:
        """The questions of the sequences from `first` to before `last`, which are counted from `first`."""
        asked_P = (self.sequence_P >= first) & (self.sequence_P < last)
        return Probe(
            name=self.name,
            tokens_NS=self.tokens_NS[first:last],
            sequence_P=self.sequence_P[asked_P] - first,
            place_P=self.place_P[asked_P],
            first_place_P=None if self.first_place_P is None else self.first_place_P[asked_P],
            options_PO=self.options_PO[asked_P],
            group_PO=None if self.group_PO is None else self.group_PO[asked_P],
        )


def make_probes(
    names: Sequence[ProbeName], tokenizer_folder: Path, *, counts_V: np.ndarray, sequence_length: int
) -> tuple[list[Probe], list[str]]:
    """The probes with these names, and a sentence for each that cannot be had.

    counts_V: how often each id that the model knows occurs in the held-out text. sequence_length: tokens that the model is
    trained to read at once.
    """
    if not names:
        return [], []
    try:
        tokenizer = Tokenizer(tokenizer_folder)
        ids = ordinary_ids(tokenizer, counts_V)
    except UserError as error:
        return [], [f"{', '.join(names)}: {error}"]
    vocab_size = len(counts_V)
    length = min(sequence_length, LONGEST)
    makers: dict[ProbeName, Callable[[], Probe]] = {
        "copying": lambda: copying(ids, length),
        "induction": lambda: induction(ids, length),
        "brackets": lambda: brackets(tokenizer, vocab_size, length),
    }
    made, missing = [], []
    for name in names:
        try:
            made.append(makers[name]())
        except NotAvailable as reason:
            missing.append(f"{name}: {reason}")
    return made, missing


def ordinary_ids(tokenizer: Tokenizer, counts_V: np.ndarray) -> np.ndarray:
    """The most frequent ids that stand for printable text: no special tokens, no pieces of a character, no line ends.

    Raises UserError for a tokenizer whose tokens are not bytes.
    """
    table = tokenizer.token_table
    by_count = np.argsort(-counts_V[: len(table)], kind="stable").tolist()
    printable = [number for number in by_count if counts_V[number] and _is_printable(table[number])]
    return np.array(sorted(printable[:MOST_IDS]), dtype=np.int64)


def copying(ids: np.ndarray, length: int) -> Probe:
    """Random tokens, and once more: each of the second time is asked for but the first, which nothing announces.

    Some sequences are long, some short. Raises NotAvailable when there are too few ids or too short sequences.
    """
    _check(ids, length)
    rng = np.random.default_rng([SEED, 1])
    half_N = np.linspace(SHORTEST // 2, length // 2, COPIES).round().astype(np.int64)
    tokens_NS = np.full((COPIES, 2 * half_N.max()), ids[0])
    for row, half in enumerate(half_N):
        tokens_NS[row, : 2 * half] = np.tile(rng.choice(ids, size=half, replace=len(ids) < half), 2)
    sequence_P = np.repeat(np.arange(COPIES), half_N - 1)
    place_P = np.concatenate([np.arange(half, 2 * half - 1) for half in half_N])
    return Probe(
        name="copying",
        tokens_NS=tokens_NS,
        sequence_P=sequence_P,
        place_P=place_P,
        first_place_P=place_P - half_N[sequence_P],
        options_PO=tokens_NS[sequence_P, place_P + 1].reshape(-1, 1),
    )


def induction(ids: np.ndarray, length: int) -> Probe:
    """Random tokens in which a pair A B occurs once, and A again at the end: is B the likeliest?

    Neither A nor B occurs elsewhere; how far the two A lie apart is spread evenly over what the length allows.
    Source: Olsson et al. 2022, In-context Learning and Induction Heads. Raises NotAvailable as `copying` does.
    """
    _check(ids, length)
    rng = np.random.default_rng([SEED, 2])
    distance_N = np.linspace(2, length - 1, REPEATS).round().astype(np.int64)  # at 2, one A B stands right before the other A
    rows, sequences = [], np.arange(REPEATS)
    for distance in distance_N:
        first, second = rng.choice(ids, size=2, replace=False)
        others = ids[(ids != first) & (ids != second)]
        row = rng.choice(others, size=length, replace=len(others) < length)
        row[[length - 1 - distance, length - 1]] = first
        row[length - distance] = second
        rows.append(row)
    tokens_NS = np.stack(rows)
    return Probe(
        name="induction",
        tokens_NS=tokens_NS,
        sequence_P=sequences,
        place_P=np.full(REPEATS, length - 1),
        first_place_P=length - 1 - distance_N,
        options_PO=tokens_NS[sequences, length - distance_N].reshape(-1, 1),
    )


def brackets(tokenizer: Tokenizer, vocab_size: int, length: int) -> Probe:
    """Code-like text that ends where its innermost bracket could be closed: is its closer likelier than the two others?

    As many of each kind and depth. A closer's probability is that of all ids whose text begins with it, since a tokenizer may
    hold `)` and `):` and more of them. Raises NotAvailable when it does not keep a closer apart from the word before, or too
    few texts fit into `length` tokens.
    """
    groups = [_ids_that_begin_with(closer, tokenizer, vocab_size) for closer in CLOSERS]

    def obstacle(text: str, prompt: list[int]) -> str | None:
        if len(prompt) > length:
            return f"its texts do not fit into data.sequence_length={length} tokens"
        if max(prompt) >= vocab_size:
            return f"its texts need token ids beyond model.vocab_size={vocab_size}"
        closed = [tokenizer.encode(text + closer) for closer in CLOSERS]
        if any(ids[:-1] != prompt or ids[-1] not in group for ids, group in zip(closed, groups, strict=True)):
            return "the tokenizer does not keep a closing bracket apart from the word before it"
        return None

    rng = np.random.default_rng([SEED, 3])
    prompts, kinds = [], []
    for depth in DEPTHS:
        for kind in range(len(CLOSERS)):
            prompts += _draw_prompts(rng, obstacle, kind=kind, depth=depth, encode=tokenizer.encode)
            kinds += [kind] * SNIPPETS
    longest = max(map(len, prompts))
    closer_O = np.repeat(np.arange(len(CLOSERS)), [len(group) for group in groups])
    return Probe(
        name="brackets",
        tokens_NS=np.array([prompt + prompt[-1:] * (longest - len(prompt)) for prompt in prompts], dtype=np.int64),
        sequence_P=np.arange(len(prompts)),
        place_P=np.array([len(prompt) - 1 for prompt in prompts], dtype=np.int64),
        options_PO=np.tile(np.concatenate(groups).astype(np.int64), (len(prompts), 1)),
        group_PO=(closer_O[None, :] - np.array(kinds)[:, None]) % len(CLOSERS),
    )


def _check(ids: np.ndarray, length: int) -> None:
    if length < SHORTEST:
        raise NotAvailable(f"needs sequences of {SHORTEST} tokens, data.sequence_length is {length}")
    if len(ids) < FEWEST_IDS:
        raise NotAvailable(f"needs {FEWEST_IDS} tokens of printable text, the held-out text has {len(ids)}")


def _is_printable(piece: bytes) -> bool:
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return False
    return bool(text) and text.isprintable()


def _ids_that_begin_with(closer: str, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    table = tokenizer.token_table[:vocab_size]
    found = [number for number, piece in enumerate(table) if piece.startswith(closer.encode())]
    if not found:
        raise NotAvailable(f"the tokenizer has no token that begins with {closer}")
    return found


def _draw_prompts(
    rng: np.random.Generator, obstacle: Callable[[str, list[int]], str | None], *, kind: int, depth: int, encode: Encode
) -> list[list[int]]:
    """SNIPPETS different ones, as ids, against which there is no obstacle."""
    found: dict[str, list[int]] = {}
    obstacles: Counter[str] = Counter()
    for _ in range(TRIES):
        text = draw_snippet(rng, kind=kind, depth=depth)
        prompt = encode(text)
        if reason := obstacle(text, prompt):
            obstacles[reason] += 1
        else:
            found[text] = prompt
        if len(found) == SNIPPETS:
            return list(found.values())
    raise NotAvailable(obstacles.most_common(1)[0][0])
