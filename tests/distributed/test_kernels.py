"""Kernels change the way, not the result: compiled, recomputed, chunked, sharded while it is built."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from tests.dist import run_ranks
from tests.distributed import uneven
from tests.distributed.test_zero_parity import reference
from train.config.kernels import KernelsConfig
from train.config.model import ModelConfig
from train.config.training import OptimConfig, ParallelConfig
from train.engine.engine import build_module, deepspeed_config
from train.model.blueprint import Blueprint
from train.model.transformer import Reading, build_layers
from train.parallel import ParallelContext, split_ranks

pytestmark = pytest.mark.further
SELDOM = pytest.mark.campaign(name="layouts")

STEPS = 6
ROWS = 16 * 4 * 4  # bytes of fp32 logits of 4 tokens per 16 rows of the vocabulary: many chunks
CHUNKED = KernelsConfig(logits_bytes=ROWS)


def train(context: ParallelContext, layout: tuple, kernels: KernelsConfig, model: ModelConfig) -> tuple[list, dict]:
    """(loss and gradient norm of each step, state at the end)."""
    zero, tensor, rows = layout
    context = split_ranks(context, tensor_parallel=tensor, sequence_parallel=rows)
    engine = uneven.make_engine(context, zero=zero, precision="fp32", model=model, kernels=kernels)
    curve = []
    for step in range(STEPS):
        result = engine.train_step(uneven.batches_of_step(step, context), lr=uneven.lr_of(step), step=step)
        curve.append((result.loss, result.grad_norm))
    return curve, uneven.logical_state(engine, context)


@pytest.mark.parametrize(
    ("layout", "ranks", "kernels"),
    [
        pytest.param((1, 1, False), 1, CHUNKED, id="chunked"),
        pytest.param((3, 1, False), 2, CHUNKED, id="chunked-zero3"),
        pytest.param((1, 2, False), 2, CHUNKED, id="chunked-tensor2"),
        pytest.param((2, 2, True), 2, CHUNKED, id="chunked-tensor2-rows"),
        pytest.param((1, 1, False), 1, KernelsConfig(recompute="selective"), id="selective"),
        pytest.param((3, 2, True), 2, KernelsConfig(recompute="selective"), id="selective-zero3-tensor2"),
        pytest.param((3, 2, True), 2, KernelsConfig(recompute="full"), id="full-zero3-tensor2"),
        pytest.param((1, 1, False), 1, KernelsConfig(compile=True), id="compiled"),
        pytest.param(
            (2, 1, False), 2, KernelsConfig(compile=True, recompute="selective"), id="compiled-zero2-selective", marks=SELDOM
        ),
        pytest.param((3, 1, False), 2, KernelsConfig(compile=True), id="compiled-zero3", marks=SELDOM),
        pytest.param((1, 2, False), 2, KernelsConfig(compile=True), id="compiled-tensor2", marks=SELDOM),
    ],
)
def test_kernels_give_the_plain_result(layout: tuple, ranks: int, kernels: KernelsConfig) -> None:
    expected, _ = reference(uneven.TINY)
    curve, _ = run_ranks(train, ranks, layout, kernels, uneven.TINY, timeout_seconds=300.0)[0]
    uneven.assert_same_curve(curve, expected[:STEPS])


def peak_of_build(context: ParallelContext, zero: int, model: ModelConfig) -> tuple[float, float]:
    """(most bytes beyond the start while the model is built, bytes of the whole model)."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back at once, and is not counted
    layers = build_layers(Blueprint(model=model, kernels=KernelsConfig()), Reading(sequence_length=16, document_mask=True))
    config = deepspeed_config(OptimConfig(), ParallelConfig(zero=zero), "fp32", 1)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    module = build_module(layers, config, context)
    for parameter in module.parameters():
        parameter.data.zero_()  # memory that nothing was written to is none yet
    peak = _resident("VmHWM") - before
    return peak, 4.0 * sum(getattr(p, "ds_numel", None) or p.numel() for p in module.parameters())


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(field))


def test_zero3_never_holds_the_whole_model() -> None:
    """32 blocks of 12 MB on 4 ranks: a rank holds its quarter and one layer, where ZeRO 1 holds all."""
    model = ModelConfig(
        family="llama", num_layers=32, hidden_size=512, num_heads=8, ffn_size=1365, max_positions=16, vocab_size=512,
        positions="rotary", norm="rms", mlp="swiglu", bias=False, tied_head=True,
    )  # fmt: skip
    for zero, most in ((3, 0.6), (1, 1.5)):
        for peak, whole in run_ranks(peak_of_build, 4, zero, model):
            assert peak < most * whole, f"ZeRO {zero}: {peak / 1e6:.0f} MB at most, the model has {whole / 1e6:.0f} MB"
            assert zero == 3 or peak > 0.9 * whole, "the measure must see a model that is held whole"
