"""Adapters and frozen layers under every layout against one process that knows nothing of DeepSpeed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from conf.errors import ConfigError
from tests.dist import run_ranks
from tests.distributed import uneven
from tests.models import initial_decoder
from train.config.adapter import LoraConfig
from train.config.kernels import KernelsConfig
from train.config.model import ModelConfig
from train.model.adapters import trained_shapes
from train.model.blueprint import Blueprint
from train.model.logical import logical_parameters
from train.model.transformer import Reading, build_layers
from train.parallel import ParallelContext, split_ranks

pytestmark = pytest.mark.further

STEPS = 6
LORA = LoraConfig(rank=3, alpha=12)
DORA = replace(LORA, dora=True)
FEW = LoraConfig(rank=2, rslora=True, targets=("blocks.1.attention.*", "blocks.0.mlp.down"))
MODELS = {"llama": uneven.TINY, "gpt2": uneven.TINY_GPT2, "untied": replace(uneven.TINY, tied_head=False)}
Case = tuple[str, LoraConfig | None, tuple[str, ...]]
CASES: dict[str, Case] = {
    "lora": ("llama", LORA, ()),
    "dora": ("llama", DORA, ()),
    "lora-biases": ("gpt2", LORA, ()),
    "dora-biases": ("gpt2", DORA, ()),
    "few": ("llama", FEW, ()),
    "lora-less": ("llama", LORA, ("blocks.0.*",)),
    "frozen-start": ("llama", None, ("embedding.*", "blocks.0.*")),
    "head-alone": ("untied", None, ("embedding.*", "blocks.*", "final_norm.*")),
    "frozen-end": ("gpt2", None, ("blocks.1.*", "*_norm.*", "embedding.positions.weight")),
}
# (ZeRO stage, tensor-parallel ranks, data-parallel ranks, rows split by sequence parallelism)
LAYOUTS = [
    (1, 1, 1, False),
    (1, 1, 2, False),
    (2, 1, 2, False),
    (3, 1, 2, False),
    (1, 2, 1, False),
    (1, 2, 1, True),
    (2, 2, 2, False),
    (3, 2, 2, True),
]
SELDOM = [(1, 1, 1, False), (1, 2, 1, False), (1, 2, 1, True), (2, 2, 2, False)]
Layout = tuple[int, int, int, bool]


@cache
def reference(name: str) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """With torch alone: (loss, gradient norm) of each step, the final state of what trains, and all that is frozen."""
    model_name, lora, frozen = CASES[name]
    model = MODELS[model_name]
    reading = Reading(sequence_length=uneven.SEQUENCE, document_mask=True)
    module = initial_decoder(Blueprint(model=model, lora=lora, frozen=frozen), reading, seed=7)
    named = {key: value for key, value in logical_parameters(module).items() if value.requires_grad}
    assert {key: value.logical.shape for key, value in named.items()} == trained_shapes(model, lora=lora, frozen=frozen)
    flat = [key for key in named if key.endswith("bias") or "norm" in key or "magnitude" in key]
    optimizer = torch.optim.AdamW(
        [
            {"params": [value for key, value in named.items() if key not in flat], "weight_decay": 0.1},
            {"params": [named[key] for key in flat], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=uneven.EPSILON,
    )
    curve = []
    for step in range(STEPS):
        batch = uneven.micro_batch(list(range(step * uneven.SEQUENCES, (step + 1) * uneven.SEQUENCES)))
        for group in optimizer.param_groups:
            group["lr"] = uneven.lr_of(step)
        objective, _, targets = module(batch.tokens, batch.labels, batch.positions, batch.document_bounds)
        loss = objective / targets
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(named.values()), 0.5)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    state = {f"weight/{key}": value.detach().view(value.logical.shape) for key, value in named.items()}
    for key, parameter in named.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            state[f"{kind}/{key}"] = optimizer.state[parameter][kind].view(parameter.logical.shape)
    still = {
        f"weight/{key}": value.detach().view(value.logical.shape)
        for key, value in logical_parameters(module).items()
        if not value.requires_grad
    }
    return curve, state, still


def train(context: ParallelContext, layout: Layout, names: list[str], precision: str) -> list[tuple[list, dict, dict, int]]:
    """For each case: curve, final state, what is frozen, and the elements that the optimizer holds on this rank."""
    zero, tensor, _, rows = layout
    context = split_ranks(context, tensor_parallel=tensor, sequence_parallel=rows)
    found = []
    for name in names:
        model, lora, frozen = CASES[name]
        engine = uneven.make_engine(context, zero=zero, precision=precision, model=MODELS[model], lora=lora, frozen=frozen)
        before = uneven.logical_state(engine, context, frozen=True)
        curve = []
        for step in range(STEPS):
            result = engine.train_step(uneven.batches_of_step(step, context), lr=uneven.lr_of(step), step=step)
            curve.append((result.loss, result.grad_norm))
        after = uneven.logical_state(engine, context, frozen=True)
        assert before.keys() == after.keys() and all(torch.equal(before[key], value) for key, value in after.items())
        state = engine._optimizer.optimizer.state
        held = sum(value.numel() for kept in state.values() for value in kept.values() if value.dim())
        found.append((curve, uneven.logical_state(engine, context), after, held))
    return found


@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=pytest.mark.campaign(name="layouts") if layout in SELDOM else []) for layout in LAYOUTS],
    ids=lambda layout: "zero{}-tensor{}-data{}-rows{}".format(*layout),
)
def test_every_layout_equals_one_process(layout: Layout) -> None:
    zero, tensor, data, _ = layout
    results = run_ranks(train, tensor * data, layout, list(CASES), "fp32")
    for index, name in enumerate(CASES):
        expected_curve, expected, still = reference(name)
        curve, state, frozen, held = results[0][index]
        uneven.assert_same_curve(curve, expected_curve, name)
        assert set(state) == set(expected) and set(frozen) == set(still)
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=0, atol=1e-5, msg=lambda t, k=f"{name} {key}": f"{k}: {t}")
        for key, value in still.items():
            assert torch.equal(frozen[key], value), f"{name}: {key} is frozen"
        model, lora, patterns = CASES[name]
        shapes = trained_shapes(MODELS[model], lora=lora, frozen=patterns)
        elements = sum(torch.Size(shape).numel() for shape in shapes.values())
        padding = 64 * len(shapes)
        assert held <= 2 * (elements / data + padding), f"{name}: the optimizer holds more than two moments of what trains"


@pytest.mark.parametrize("layout", [(1, 1, 2, False), (2, 1, 2, False), (3, 1, 2, False), (1, 2, 2, True)])
def test_bf16_stays_near_fp32(layout: Layout) -> None:
    names = ["lora", "dora", "frozen-start"]
    results = run_ranks(train, layout[1] * layout[2], layout, names, "bf16")[0]
    for name, (curve, state, _, _) in zip(names, results, strict=True):
        expected, _, _ = reference(name)
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
        losses, expected_losses = (torch.tensor(pairs)[:, 0] for pairs in (curve, expected))
        torch.testing.assert_close(losses, expected_losses, rtol=0, atol=0.02)


def curve_of(context: ParallelContext, zero: int, kernels: KernelsConfig, lora: LoraConfig) -> list[tuple[float, float]]:
    engine = uneven.make_engine(context, zero=zero, precision="fp32", kernels=kernels, lora=lora)
    results = [engine.train_step(uneven.batches_of_step(step, context), lr=uneven.lr_of(step), step=step) for step in range(5)]
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize(
    ("zero", "kernels", "name"),
    [
        pytest.param(1, KernelsConfig(logits_bytes=16 * 4 * 4), "lora", id="chunked"),
        pytest.param(2, KernelsConfig(compile=True), "dora", id="compiled"),
        pytest.param(
            3,
            KernelsConfig(compile=True, recompute="selective"),
            "dora",
            id="compiled-zero3-selective",
            marks=pytest.mark.campaign(name="layouts"),
        ),
        pytest.param(3, KernelsConfig(recompute="full"), "dora", id="full-zero3"),
    ],
)
def test_kernels_give_the_plain_result(zero: int, kernels: KernelsConfig, name: str) -> None:
    curve = run_ranks(curve_of, 2, zero, kernels, CASES[name][1], timeout_seconds=300.0)[0]
    uneven.assert_same_curve(curve, reference(name)[0][:5])


def dropped(context: ParallelContext, tensor: int, rows: bool) -> list[list[float]]:
    """Losses with dropout before the adapters, twice; the ranks' copies are compared on the way."""
    context = split_ranks(context, tensor_parallel=tensor, sequence_parallel=rows)
    curves = []
    for dora in (False, False, True, True):
        lora = replace(LORA, dropout=0.3, dora=dora)
        engine = uneven.make_engine(context, zero=1, precision="fp32", lora=lora)
        curves.append(
            [engine.train_step(uneven.batches_of_step(step, context), lr=uneven.LR, step=step).loss for step in range(6)]
        )
        uneven.logical_state(engine, context)
    return curves


@pytest.mark.parametrize(("tensor", "rows"), [(1, False), (2, False), (2, True)])
def test_dropout_repeats_itself_and_keeps_the_ranks_together(tensor: int, rows: bool) -> None:
    for first, second, third, fourth in run_ranks(dropped, 2, tensor, rows):
        assert first == second and third == fourth
        undisturbed = torch.tensor([loss for loss, _ in reference("lora")[0][:6]])
        assert (torch.tensor(first) - undisturbed)[2:].abs().max() > 1e-6, "nothing was dropped"


@pytest.mark.parametrize(
    ("lora", "frozen", "words"),
    [
        (None, ("*",), "leaves nothing to train"),
        (LORA, ("*.lora_*",), "leaves nothing to train"),
        (None, ("encoder.*",), "frozen=encoder.*: is no tensor of the model"),
        (replace(LORA, targets=("blocks.*.attention.query",)), (), "targets=blocks.*.attention.query: is no linear layer"),
    ],
)
def test_patterns_that_fit_nothing_are_errors(lora: LoraConfig | None, frozen: tuple[str, ...], words: str) -> None:
    model: ModelConfig = uneven.TINY
    with pytest.raises(ConfigError) as error:
        build_layers(Blueprint(model=model, lora=lora, frozen=frozen), Reading(sequence_length=8, document_mask=False))
    assert words in str(error.value)
