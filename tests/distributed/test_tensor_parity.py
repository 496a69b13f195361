"""Tensor-parallel ranks, with and without sequence parallelism, against one process that knows of neither."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.dist import run_ranks
from tests.distributed import uneven
from tests.distributed.test_zero_parity import reference
from tests.models import initial_value
from train.config.kernels import KernelsConfig
from train.config.model import ModelConfig
from train.model.crossings import own_draws
from train.parallel import ParallelContext, split_ranks

MODELS = {
    "llama": uneven.TINY,
    "gpt2": uneven.TINY_GPT2,
    "qwen3": uneven.TINY_QWEN3,
    "gemma": uneven.TINY_GEMMA,
    "olmo2": uneven.TINY_OLMO2,
    "parallel": uneven.TINY_PARALLEL,
    "labels": uneven.TINY_LABELS,
}
LAYOUTS = [(2, data, zero, rows) for data in (1, 2) for zero in (1, 2, 3) for rows in (False, True)]
# Each pair of (data-parallel ranks, ZeRO stage, rows split) occurs.
PAIRWISE = [
    (2, 1, 1, False), (2, 2, 1, True), (2, 1, 2, True), (2, 2, 2, False), (2, 1, 3, False), (2, 2, 3, True),
]  # fmt: skip
FEW_LAYOUTS = [(2, 1, 1, True), (2, 1, 1, False), (2, 2, 3, True)]


def tier_of(layout: tuple[int, int, int, bool], name: str) -> pytest.MarkDecorator | tuple[()]:
    if layout in (PAIRWISE if name == "llama" else FEW_LAYOUTS[:1]):
        return ()
    return pytest.mark.further if layout == FEW_LAYOUTS[-1] else pytest.mark.campaign(name="layouts")


def train(
    context: ParallelContext, tensor: int, rows: bool, zero: int, precision: str, model: ModelConfig
) -> tuple[dict, list, dict]:
    """(state at the start, loss and gradient norm of each step, state at the end)."""
    context = split_ranks(context, tensor_parallel=tensor, sequence_parallel=rows)
    engine = uneven.make_engine(context, zero=zero, precision=precision, model=model)
    start = uneven.logical_state(engine, context)
    curve = []
    for step in range(uneven.STEPS):
        batches = uneven.batches_of_step(step, context, len(model.labels))
        result = engine.train_step(batches, lr=uneven.lr_of(step), step=step)
        curve.append((result.loss, result.grad_norm))
    return start, curve, uneven.logical_state(engine, context)


@pytest.mark.parametrize(
    ("tensor", "data", "zero", "rows", "name"),
    [
        pytest.param(*layout, name, marks=tier_of(layout, name))
        for name in MODELS
        for layout in LAYOUTS
        if layout in FEW_LAYOUTS or name in ("llama", "gpt2", "qwen3")
    ],
)
def test_fp32_equals_one_process(tensor: int, data: int, zero: int, rows: bool, name: str) -> None:
    model = MODELS[name]
    expected_curve, expected = reference(model)
    start, curve, state = run_ranks(train, tensor * data, tensor, rows, zero, "fp32", model)[0]
    for key, value in start.items():
        kind, _, logical_name = key.partition("/")
        if kind == "weight":
            whole = uneven.whole(logical_name, model)
            assert torch.equal(value, initial_value(model, whole, 7)), f"{logical_name} does not start from the same bits"
    # Gradients of a few labelled rows are larger than those of many tokens.
    uneven.assert_same_curve(curve, expected_curve, norm_rtol=1e-5 if model.labels else 1e-6)
    assert set(state) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("rows", [False, True])
def test_bf16_stays_near_fp32(rows: bool) -> None:
    """The bound of `test_zero_parity`: bf16 losses of 10 steps within 0.02 nats of one process in fp32."""
    expected_curve, _ = reference(uneven.TINY)
    _, curve, _ = run_ranks(train, 4, 2, rows, 1, "bf16", uneven.TINY)[0]
    losses, expected = (torch.tensor(pairs)[:, 0] for pairs in (curve, expected_curve))
    torch.testing.assert_close(losses, expected, rtol=0, atol=0.02)


def dropped(context: ParallelContext, rows: bool, recompute: str) -> tuple[list, list]:
    """Losses of a model with dropout, twice from the same seed; the ranks' copies are compared on the way."""
    context = split_ranks(context, tensor_parallel=2, sequence_parallel=rows)
    model = replace(uneven.TINY_GPT2, dropout=0.3)
    curves = []
    for _ in range(2):
        engine = uneven.make_engine(context, zero=1, precision="fp32", model=model, kernels=KernelsConfig(recompute=recompute))
        curves.append(
            [engine.train_step(uneven.batches_of_step(step, context), lr=uneven.LR, step=step).loss for step in range(5)]
        )
        uneven.logical_state(engine, context)  # norms and biases would drift apart if the ranks dropped differently
    return tuple(curves)


@pytest.mark.further
@pytest.mark.parametrize("rows", [False, True])
def test_dropout_repeats_itself_and_keeps_the_ranks_together(rows: bool) -> None:
    plain, recomputed = (run_ranks(dropped, 2, rows, recompute) for recompute in ("none", "full"))
    for first, second in (*plain, *recomputed):
        assert first == second
    assert plain[0] == plain[1] == recomputed[0], "recomputing must draw the same"


def draws(context: ParallelContext, rows: bool) -> tuple[list[float], list[float]]:
    """What the attention of a rank draws, and what the ranks draw around it."""
    tensor = split_ranks(context, tensor_parallel=2, sequence_parallel=rows).tensor
    torch.manual_seed(5)
    with own_draws(tensor, "blocks.0.attention", dropout=0.1):
        inside = torch.rand(3).tolist()
    return inside, torch.rand(3).tolist()


def test_heads_draw_apart_and_rows_alike() -> None:
    (first, shared), (second, other_shared) = run_ranks(draws, 2, False)
    assert first != second and shared == other_shared
