"""Models that tell labels apart against transformers' ...ForSequenceClassification, with the same weights and rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.dist import run_ranks
from tests.parity.pairs import CASES, VOCAB_SIZE, Pair, gradients_of, make_pair
from train.config.model import ModelConfig
from train.config.training import OptimConfig, ParallelConfig
from train.engine import Engine
from train.model.blueprint import Blueprint
from train.model.heads import IGNORE
from train.model.transformer import Reading, build_layers
from train.optim import OptimizerSpec
from train.parallel import ParallelContext

LABELS = ("negative", "neutral", "positive")
TOLERANCE = 1e-5
LEARNING_RATE, EPSILON, STEPS = 3e-3, 1e-5, 20


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of several lengths, one behind the other, and the number of each one's label."""

    rows: list[Tensor]
    labels: Tensor

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(row) for row in self.rows])

    @property
    def tokens(self) -> Tensor:
        return torch.cat(self.rows)

    @property
    def positions(self) -> Tensor:
        return torch.cat([torch.arange(len(row)) for row in self.rows])

    @property
    def document_bounds(self) -> Tensor:
        ends = self.lengths.cumsum(0).tolist()
        return torch.tensor([0, *ends, ends[-1], ends[-1]], dtype=torch.int32)  # filled up, as a loader's are

    @property
    def labels_T(self) -> Tensor:
        labels = torch.full((len(self.tokens),), IGNORE)
        labels[self.lengths.cumsum(0) - 1] = self.labels
        return labels

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.tokens, self.labels_T, self.positions, self.document_bounds


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The same as the engine reads it."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    document_bounds: Tensor
    target_tokens: int
    references: None = None

    @staticmethod
    def of(rows: Rows) -> Batch:
        tokens_T, labels_T, positions_T, bounds = rows.state
        return Batch(
            tokens=tokens_T, labels=labels_T, positions=positions_T, document_bounds=bounds, target_tokens=len(rows.rows)
        )


def some_rows(lengths: list[int], seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in lengths]
    return Rows(rows=rows, labels=torch.randint(len(LABELS), (len(rows),), generator=generator))


def with_labels(case: str) -> ModelConfig:
    return replace(CASES[case], labels=LABELS)


def their_loss(pair: Pair, rows: Rows) -> Tensor:
    """Summed over the rows, each of which transformers reads alone."""
    losses = [
        pair.theirs(input_ids=row[None], labels=label[None]).loss for row, label in zip(rows.rows, rows.labels, strict=True)
    ]
    return torch.stack(losses).sum()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", [[23], [1], [12, 1, 30, 7]], ids=["one", "one-token", "packed"])
def test_loss_and_gradients_are_those_of_transformers(case: str, lengths: list[int]) -> None:
    model = with_labels(case)
    pair, rows = make_pair(model), some_rows(lengths)
    decoder = pair.ours(sum(lengths), document_mask=True)
    objective, loss, targets = decoder(*rows.state)
    expected = their_loss(pair, rows)
    assert int(targets) == len(lengths)
    torch.testing.assert_close(objective, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert loss.item() == objective.item() and not loss.requires_grad
    objective.backward()
    expected.backward()
    ours, theirs = gradients_of(decoder), pair.their_gradients()
    assert ours.keys() == theirs.keys() and "score.weight" in ours and "head.weight" not in ours
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", ["llama-gqa", "gpt2", "qwen3"])
def test_scores_of_every_position_are_those_of_transformers(case: str) -> None:
    pair, rows = make_pair(with_labels(case)), some_rows([23])
    tokens_T = rows.rows[0]
    with torch.no_grad():
        ours = pair.ours(23).logits(tokens_T, rows.positions, rows.document_bounds)
        theirs = torch.cat([pair.theirs(input_ids=tokens_T[None, : end + 1]).logits for end in range(23)])
    assert ours.shape == (23, len(LABELS))
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


# Micro-batches of different numbers of rows: the mean is over all rows of a step.
LENGTHS = ([30, 5, 29], [64], [1, 10, 20, 33])
OPTIM = OptimConfig(lr=LEARNING_RATE, epsilon=EPSILON, grad_clip=1.0, weight_decay=0.1)


def rows_of_step(step: int) -> list[Rows]:
    return [some_rows(lengths, seed=len(LENGTHS) * step + number) for number, lengths in enumerate(LENGTHS)]


def our_curve(context: ParallelContext, model: ModelConfig) -> list[float]:
    """Losses of an engine whose model begins with the weights of transformers'."""
    pair = make_pair(model)
    engine = Engine(
        build_layers(Blueprint(model=model), Reading(sequence_length=64, document_mask=True)),
        optimizer=OptimizerSpec(settings=OPTIM),
        parallel=ParallelConfig(zero=1),
        precision="fp32",
        micro_batch=1,
        dropout_seed=0,
        context=context,
    )
    weights = {name: value.detach() for name, value in pair.named_weights().items()}
    for piece in engine.fragments():
        whole = pair.keymap.to_logical(piece.logical.name, weights.__getitem__).reshape(-1)
        piece.tensors["weight"].copy_(whole[piece.start : piece.start + piece.tensors["weight"].numel()])
    engine.loaded(0)
    curve = []
    for step in range(STEPS):
        batches = [Batch.of(rows) for rows in rows_of_step(step)]
        curve.append(engine.train_step(batches, lr=LEARNING_RATE, step=step).loss)
    return curve


def their_curve(pair: Pair) -> list[float]:
    """Losses of transformers' model under torch's AdamW."""
    named = dict(pair.theirs.named_parameters())
    matrices = [value for value in named.values() if value.ndim > 1]
    vectors = [value for value in named.values() if value.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=EPSILON,
    )
    curve = []
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = rows_of_step(step)
        loss = sum(their_loss(pair, rows) for rows in parts) / sum(len(rows.rows) for rows in parts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("case", ["llama-gqa", "gpt2", "qwen3"])
def test_twenty_steps_are_those_of_transformers(case: str) -> None:
    pair = make_pair(with_labels(case))
    expected = their_curve(pair)
    assert run_ranks(our_curve, 1, pair.model)[0] == pytest.approx(expected, abs=1e-4)
    fresh = make_pair(pair.model).theirs.score.weight
    assert (pair.theirs.score.weight - fresh).abs().max() > 1e-2, "the head must have moved for this test to mean something"
