"""Checks of what both models say: logits at many positions, and greedy continuations.

Shapes: B sequences, S positions, T = B x S, C positions of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from math import ceil, isfinite, sqrt
from tempfile import TemporaryFile

import torch
from torch import Tensor

from train.config.model import ModelConfig
from train.convert.proof.finding import LOGITS_TOLERANCE, Figures, Finding
from train.convert.proof.ours import OurModel
from train.convert.proof.parting import Parting
from train.convert.proof.rows import Rows, positions_at_once
from train.convert.proof.theirs import TheirModel

MIN_POSITIONS = 1000
"""Positions at which the likeliest token must be the same."""
MAX_LENGTH = 512
"""Longest random sequence of a model without windows."""
SCORE_BYTES = 1 << 28
"""Of the attention scores of a longer one, which reaches beyond a window."""
PROMPT_TOKENS, NEW_TOKENS, PROMPTS = 16, 16, 4
LARGE, FEW_NEW_TOKENS = 200_000_000, 4
"""Parameters from which on there are fewer new tokens: each takes a reading of all the weights."""


@dataclass(kw_only=True)
class Comparison:
    """What is gathered over chunks of logits."""

    positions: int = 0
    worst: float = 0.0
    squares: float = 0.0
    values: int = 0
    equal: int = 0
    margins: list[Tensor] = field(default_factory=list)
    """Of the positions whose likeliest token differs: the distance of ours to the second."""

    def add(self, ours_CV: Tensor, theirs_CV: Tensor) -> None:
        """Compare the logits of some positions."""
        difference = (ours_CV - theirs_CV).abs().max().item()
        self.worst = max(self.worst, difference if difference == difference else float("inf"))
        self.squares += ours_CV.norm().item() ** 2
        self.values += ours_CV.numel()
        same_C = ours_CV.argmax(dim=1) == theirs_CV.argmax(dim=1)
        self.positions += len(same_C)
        self.equal += int(same_C.sum())
        self.margins.append(margin(ours_CV[~same_C]))

    @property
    def allowed(self) -> float:
        """The difference that fp32 may leave: more where the logits are larger."""
        return LOGITS_TOLERANCE * max(1.0, sqrt(self.squares / self.values)) if self.values else LOGITS_TOLERANCE

    @property
    def ties(self) -> int:
        """Positions with two likeliest tokens, whose order fp32 cannot keep."""
        return sum(int((each <= self.allowed).sum()) for each in self.margins)


def margin(logits_CV: Tensor) -> Tensor:
    """Distance [C] of the two largest logits."""
    best_C2 = logits_CV.topk(min(2, logits_CV.shape[1]), dim=1).values
    return best_C2[:, 0] - best_C2[:, -1]


def sequence_length(model: ModelConfig) -> int:
    """Length of the random sequences: longer than a window, where the scores of attention are not too many."""
    usual = min(model.max_positions, MAX_LENGTH)
    windows = [model.window_of(number) for number in range(model.num_layers)]
    wanted = max((window + 32 for window in windows if window is not None), default=usual)
    fits = wanted <= model.max_positions and 4 * model.num_heads * wanted**2 <= SCORE_BYTES
    return max(usual, wanted) if fits else usual


def random_rows(model: ModelConfig) -> Rows:
    """Random ids; the last sequence lies at the far end of the context."""
    length = sequence_length(model)
    count = ceil(MIN_POSITIONS / length) + 1
    tokens_BS = torch.randint(model.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))
    starts_B1 = torch.tensor([0] * (count - 1) + [model.max_positions - length]).unsqueeze(1)
    return Rows(tokens=tokens_BS, positions=starts_B1 + torch.arange(length), labels=tokens_BS)


def prove_logits(ours: OurModel, theirs: TheirModel, model: ModelConfig) -> Finding:
    """Logits of random ids, and the likeliest token at each position; where they differ, the first layer that does."""
    rows = random_rows(model)
    length = rows.tokens.shape[1]
    found, parting = Comparison(), Parting(length)
    for part in rows.split(max(1, positions_at_once(model) // length)):
        ours_TH, theirs_TH = _run_both(ours, theirs, part, parting)
        for ours_CV, theirs_CV in zip(_kept(ours.logits(ours_TH)), theirs.logits(theirs_TH), strict=True):
            found.add(ours_CV, theirs_CV)
    problems = []
    if not (isfinite(found.worst) and found.worst <= found.allowed):
        what = f"differ by up to {found.worst:.3g}" if isfinite(found.worst) else "are not all finite"
        place = f"the models part {parting.place or 'in the head: the hidden states before it are equal'}"
        problems.append(f"logits {what}, allowed is {found.allowed:.3g}; {place}")
    if found.equal + found.ties < found.positions or found.equal < MIN_POSITIONS:
        what = "label" if model.labels else "token"
        problems.append(f"the likeliest {what} is the same at {found.equal} of {found.positions} positions")
    figures: Figures = {
        "max_abs_difference": found.worst,
        "tolerance": found.allowed,
        "positions": found.positions,
        "longest_sequence": length,
        "last_position": model.max_positions - 1,
        "argmax_equal": found.equal,
        "argmax_ties": found.ties,
    }
    windows = {model.window_of(number) for number in range(model.num_layers)} - {None}
    if windows:
        figures["beyond_every_window"] = "yes" if length > max(windows) else f"no, the longest is {max(windows)}"
    return Finding(name="logits", figures=figures, problems=tuple(problems))


def _run_both(ours: OurModel, theirs: TheirModel, rows: Rows, parting: Parting) -> tuple[Tensor, Tensor]:
    """Hidden states [T, H] of both after the final norm; the models run side by side, so that no layer's are kept."""
    layers = ours.layers([rows.state], rows.reading, what="logits")
    last_TH: list[Tensor] = []

    def watch(name: str, theirs_TH: Tensor) -> None:
        our_name, (ours_TH,) = next(layers)
        assert our_name == name, f"{our_name} is held against {name}"
        parting.compare(name, ours_TH, theirs_TH)
        last_TH[:] = [ours_TH]

    theirs_TH = theirs.hidden(rows, watch)
    layers.close()
    return last_TH[0], theirs_TH


def _kept(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same chunks, taken at once and kept in a file: what made them can go before something else is loaded."""
    with TemporaryFile() as stream:
        shapes = []
        for chunk_CV in chunks:
            shapes.append(chunk_CV.shape)
            stream.write(chunk_CV.contiguous().numpy().data)
        stream.seek(0)
        for shape in shapes:
            chunk_CV = torch.empty(shape)
            read = stream.readinto(chunk_CV.numpy().data)
            assert read == chunk_CV.nbytes, f"{read} bytes of {chunk_CV.nbytes} came back"
            yield chunk_CV


def prove_generation(ours: OurModel, theirs: TheirModel, model: ModelConfig) -> Finding:
    """Greedy continuations of random prompts by transformers, over its cache; each id must be the likeliest to ours."""
    prompt_tokens = min(PROMPT_TOKENS, max(1, model.max_positions // 2))
    usual = min(NEW_TOKENS, model.max_positions - prompt_tokens)
    new_tokens = min(usual, FEW_NEW_TOKENS) if theirs.num_parameters >= LARGE else usual
    prompts_BS = torch.randint(model.vocab_size, (PROMPTS, prompt_tokens), generator=torch.Generator().manual_seed(1))
    new_BS = torch.stack(list(theirs.continue_greedily(prompts_BS, new_tokens)), dim=1)
    whole_BS = torch.cat([prompts_BS, new_BS], dim=1)[:, :-1]
    length = whole_BS.shape[1]
    rows = Rows(tokens=whole_BS, positions=torch.arange(length).expand(PROMPTS, -1), labels=whole_BS)
    (hidden_TH,) = ours.hidden([rows.state], rows.reading)
    before_TH = hidden_TH.view(PROMPTS, length, -1)[:, prompt_tokens - 1 :].flatten(0, 1)
    logits_TV = torch.cat(list(ours.logits(before_TH)))
    allowed = LOGITS_TOLERANCE * max(1.0, logits_TV.square().mean().sqrt().item())
    ours_BS = logits_TV.argmax(dim=1).view(PROMPTS, new_tokens)
    parted_BS = (ours_BS != new_BS) & ~(margin(logits_TV) <= allowed).view(PROMPTS, new_tokens)
    problems = [
        f"prompt {row}: new token {place} is {int(new_BS[row, place])} to transformers, {int(ours_BS[row, place])} to ours"
        for row, place in _first_of_each_row(parted_BS)
    ]
    figures: Figures = {"prompts": PROMPTS, "new_tokens": new_tokens}
    if new_tokens < usual:
        figures["fewer_new_tokens"] = f"{new_tokens} in place of {usual}: each takes a reading of all the weights"
    return Finding(name="generation", figures=figures, problems=tuple(problems))


def _first_of_each_row(marked_BS: Tensor) -> Iterator[tuple[int, int]]:
    for row, marked_S in enumerate(marked_BS):
        yield from zip(repeat(row), marked_S.nonzero().flatten().tolist()[:1], strict=False)
