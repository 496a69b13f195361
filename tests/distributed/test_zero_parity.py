"""ZeRO 1, 2, 3 on one and two ranks against one process that knows nothing of DeepSpeed."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from tests.dist import run_ranks
from tests.distributed import uneven
from tests.models import initial_decoder
from train.config.model import ModelConfig
from train.model.blueprint import Blueprint
from train.model.logical import logical_parameters
from train.model.transformer import Reading
from train.parallel import ParallelContext

STEPS = uneven.STEPS


@cache
def reference(model: ModelConfig) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """The same training with torch alone: (loss, grad norm) of each step, and the final state by logical name."""
    reading = Reading(sequence_length=uneven.SEQUENCE, document_mask=True)
    module = initial_decoder(Blueprint(model=model), reading, seed=7)
    named = logical_parameters(module)
    norms = [p for n, p in named.items() if n.endswith("bias") or "norm" in n]
    matrices = [p for n, p in named.items() if not (n.endswith("bias") or "norm" in n)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=uneven.EPSILON,
    )
    curve = []
    for step in range(STEPS):
        sample_ids = list(range(step * uneven.SEQUENCES, (step + 1) * uneven.SEQUENCES))
        batch = uneven.micro_batch(sample_ids, len(model.labels))
        for group in optimizer.param_groups:
            group["lr"] = uneven.lr_of(step)
        objective, loss, targets = module(batch.tokens, batch.labels, batch.positions, batch.document_bounds)
        optimizer.zero_grad()
        (objective / targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(named.values()), 0.5)
        optimizer.step()
        curve.append(((loss / targets).item(), norm.item()))
    state = {f"weight/{name}": p.detach().view(p.logical.shape) for name, p in named.items()}
    for name, parameter in named.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            state[f"{kind}/{name}"] = optimizer.state[parameter][kind].view(parameter.logical.shape)
    return curve, state


def train(context: ParallelContext, zero: int, precision: str, model: ModelConfig) -> tuple[list, dict]:
    engine = uneven.make_engine(context, zero=zero, precision=precision, model=model)
    curve = []
    for step in range(STEPS):
        batches = uneven.batches_of_step(step, context, len(model.labels))
        result = engine.train_step(batches, lr=uneven.lr_of(step), step=step)
        curve.append((result.loss, result.grad_norm))
    return curve, uneven.logical_state(engine, context)


MODELS = {"llama": uneven.TINY, "gpt2": uneven.TINY_GPT2, "labels": uneven.TINY_LABELS}
# Each pair of (ZeRO stage, ranks, model) occurs.
PAIRWISE = [
    (1, 1, "llama"), (1, 2, "gpt2"), (1, 2, "labels"), (2, 2, "llama"), (2, 1, "gpt2"), (2, 1, "labels"), (3, 2, "llama"),
    (3, 1, "gpt2"), (3, 2, "labels"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("zero", "world_size", "name"),
    [
        pytest.param(*case, marks=() if case in PAIRWISE else pytest.mark.further)
        for case in itertools.product((1, 2, 3), (1, 2), MODELS)
    ],
)
def test_fp32_equals_plain_torch(zero: int, world_size: int, name: str) -> None:
    model = MODELS[name]
    expected_curve, expected = reference(model)
    curve, state = run_ranks(train, world_size, zero, "fp32", model)[0]
    # Gradients of a few labelled rows are larger than those of many tokens.
    uneven.assert_same_curve(curve, expected_curve, norm_rtol=1e-5 if model.labels else 1e-6)
    assert expected_curve[0][1] > 0.5, "clipping must be active for this test to mean something"
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.further), 2])
@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.further), 3])
def test_bf16_stays_near_fp32(zero: int, world_size: int) -> None:
    """bf16 rounds weights and activations to 8 bits: losses of 10 steps stay within 0.02 nats of fp32's."""
    expected_curve, _ = reference(uneven.TINY)
    curve, state = run_ranks(train, world_size, zero, "bf16", uneven.TINY)[0]
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    losses = torch.tensor([loss for loss, _ in curve])
    torch.testing.assert_close(losses, torch.tensor([loss for loss, _ in expected_curve]), rtol=0, atol=0.02)


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.further), 3])
def test_bf16_gradients_are_summed_over_the_ranks_in_fp32(zero: int) -> None:
    """Two ranks then have the gradient norm of one, but for the last bits; sums in bf16 would differ in the fifth digit."""
    alone, together = (run_ranks(train, size, zero, "bf16", uneven.TINY)[0][0][0] for size in (1, 2))
    assert together[1] == pytest.approx(alone[1], rel=1e-6)
