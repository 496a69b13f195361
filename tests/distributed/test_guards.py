"""A step with anything non-finite in it, on whichever rank and micro-batch, leaves weights and moments as they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from tests.dist import run_ranks
from tests.distributed import uneven
from train.config.training import OptimConfig
from train.engine import Engine
from train.model.logical import logical_parameters
from train.parallel import ParallelContext, split_ranks

LAYOUTS = [  # ZeRO stage, precision, ranks, tensor-parallel ranks
    pytest.param(1, "bf16", 1, 1, marks=pytest.mark.further),
    (1, "bf16", 2, 1),
    (1, "fp32", 2, 1),
    pytest.param(2, "bf16", 2, 1, marks=pytest.mark.further),
    (2, "fp32", 2, 1),
    (3, "bf16", 2, 1),
    pytest.param(3, "fp32", 2, 1, marks=pytest.mark.further),
    pytest.param(1, "bf16", 2, 2, marks=pytest.mark.further),
    (3, "fp32", 2, 2),
]


def poison_gradient(engine: Engine, name: str, value: float, call: int) -> Callable[[], None]:
    """Put `value` into one element of the gradient of `name` at its `call`-th backward pass; returns how to end it."""
    parameter, seen = logical_parameters(engine.module)[name], []

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(None)
        if len(seen) - 1 != call:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    return parameter.register_hook(hook).remove


def poison_loss(engine: Engine, value: float) -> Callable[[], None]:
    """Report `value` as the loss of a micro-batch whose gradients are finite; returns how to end it."""
    head = engine.module.layers[-1]
    handle = head.register_forward_hook(lambda module, inputs, output: (output[0], output[1] * value, output[2]))
    return handle.remove


def spoiled_steps(context: ParallelContext, zero: int, precision: str, tensor: int, optim: OptimConfig) -> list[str]:
    """One good step, then every kind of bad one, then a good one; what is not as it should be, in words."""
    context = split_ranks(context, tensor_parallel=tensor)
    engine = uneven.make_engine(context, zero=zero, precision=precision, optim=optim)
    engine.train_step(uneven.batches_of_step(0, context), lr=uneven.LR, step=0)
    before, updates = uneven.logical_state(engine, context), engine.updates
    passes = len(uneven.batches_of_step(1, context))
    matrix, norm = "blocks.1.mlp.down.weight", "blocks.0.attention_norm.weight"
    ways: dict[str, Callable[[], Callable[[], None]]] = {
        "NaN in the first micro-batch": partial(poison_gradient, engine, matrix, math.nan, 0),
        "NaN in the last micro-batch": partial(poison_gradient, engine, matrix, math.nan, passes - 1),
        "inf in one element of a norm": partial(poison_gradient, engine, norm, math.inf, passes - 1),
        "-inf in the embedding": partial(poison_gradient, engine, "embedding.tokens.weight", -math.inf, 0),
        "a loss of inf with finite gradients": partial(poison_loss, engine, math.inf),
        "a loss of NaN with finite gradients": partial(poison_loss, engine, math.nan),
    }
    wrong = []
    for what, begin in ways.items():
        # On one rank alone, the last, or for what all ranks of a model compute alike on all of them.
        end = begin() if context.rank == context.world_size - 1 or context.tensor.size > 1 else lambda: None
        result = engine.train_step(uneven.batches_of_step(1, context), lr=uneven.LR, step=1)
        end()
        if not result.skipped:
            wrong.append(f"{what}: not skipped")
        after = uneven.logical_state(engine, context)
        wrong += [f"{what}: {name} has changed" for name in before if not torch.equal(before[name], after[name])]
        if engine.updates != updates:
            wrong.append(f"{what}: counted as an update")
    result = engine.train_step(uneven.batches_of_step(1, context), lr=uneven.LR, step=1)
    if result.skipped or not math.isfinite(result.grad_norm) or engine.updates != updates + 1:
        wrong.append("the good step after them is not applied")
    fresh = uneven.make_engine(context, zero=zero, precision=precision, optim=optim)
    for step in (0, 1):
        fresh.train_step(uneven.batches_of_step(step, context), lr=uneven.LR, step=step)
    state, expected = uneven.logical_state(engine, context), uneven.logical_state(fresh, context)
    wrong += [
        f"{name} is not that of a run without bad steps" for name in state if not torch.equal(state[name], expected[name])
    ]
    return wrong


@pytest.mark.parametrize(("zero", "precision", "ranks", "tensor"), LAYOUTS)
def test_nothing_of_a_bad_step_is_left(zero: int, precision: str, ranks: int, tensor: int) -> None:
    assert run_ranks(spoiled_steps, ranks, zero, precision, tensor, uneven.ADAMW) == [[]] * ranks


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_nothing_of_a_bad_step_is_left_with_muon(precision: str) -> None:
    optim = OptimConfig(kind="muon", lr=uneven.LR, newton_schulz="standard")
    assert run_ranks(spoiled_steps, 2, 1, precision, 1, optim) == [[], []]


def multiplied_by_zero(context: ParallelContext) -> list[str]:
    """The mistake that this guards against: the update of a skipped step times 0, which keeps a NaN."""

    def update_times_zero(self: Engine) -> None:
        for piece in self.fragments():
            piece.tensors["weight"].add_(torch.full_like(piece.tensors["weight"], math.nan) * 0)

    original = Engine.train_step

    def step(self: Engine, *arguments: object, **options: object) -> object:
        result = original(self, *arguments, **options)
        if result.skipped:
            update_times_zero(self)
        return result

    Engine.train_step = step
    return spoiled_steps(context, 1, "bf16", 1, uneven.ADAMW)


def test_an_update_times_zero_is_noticed() -> None:
    assert any("weight has changed" in line for line in run_ranks(multiplied_by_zero, 1)[0])


ORDERS = [
    ("load", "probe", "skip", "skip", "skip", "train", "evaluate"),
    ("load", "probe", "skip", "probe", "train", "evaluate"),
    ("load", "probe", "skip", "skip", "skip", "load", "probe", "train", "evaluate"),
]


def in_order(context: ParallelContext, order: tuple[str, ...]) -> float:
    engine = uneven.make_engine(context, zero=3, precision="bf16", model=uneven.TINY_GPT2)
    batches = uneven.batches_of_step(0, context)
    loss = 0.0
    for what in order:
        if what == "load":
            engine.loaded(engine.updates)
        elif what == "probe":
            engine.probe()
        elif what == "evaluate":
            loss = engine.evaluate(batches[0]).loss_sum
        else:
            end = poison_gradient(engine, "embedding.tokens.weight", math.nan, 0) if what == "skip" else lambda: None
            assert engine.train_step(batches, lr=uneven.LR, step=1).skipped == (what == "skip")
            end()
    return loss


@pytest.mark.parametrize(
    "order", [ORDERS[0], *(pytest.param(order, marks=pytest.mark.further) for order in ORDERS[1:])], ids=" ".join
)
def test_stage_3_goes_on_behind_skipped_steps(order: tuple[str, ...]) -> None:
    """Stage 3 follows the order of modules; a skipped step must not leave it with another one."""
    undisturbed = tuple(what for what in order if what != "skip")
    assert run_ranks(in_order, 2, order, timeout_seconds=120) == run_ranks(in_order, 2, undisturbed, timeout_seconds=120)
