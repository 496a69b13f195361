"""Linear layers in 8-bit floats: against float64, within what rounding to three or two bits of mantissa allows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from conf.errors import UserError
from tests.dist import run_ranks
from tests.distributed import uneven
from tests.distributed.test_zero_parity import STEPS, reference
from tests.models import initial_decoder
from train.model.blueprint import Blueprint
from train.model.float8 import Float8Linear, Scaling, check_device, cpu_has_product, product, product_line, quantized
from train.model.transformer import Reading
from train.parallel import ParallelContext

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOKENS, IN, OUT = 48, 64, 80
DEEP = uneven.replace(uneven.TINY, num_layers=4)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input [T, I], weight [O, I], bias [O], gradient [T, O]; rows of very different sizes among them."""
    generator = torch.Generator().manual_seed(5)
    sizes = ((TOKENS, IN), (OUT, IN), (OUT,), (TOKENS, OUT))
    made = [torch.randn(size, generator=generator) for size in sizes]
    made[0] *= torch.logspace(-2, 2, TOKENS).unsqueeze(1)
    return tuple(tensor.to(dtype) for tensor in made)


def on_this_cpu(left: Tensor, right: Tensor, scaling: Scaling) -> Tensor:
    return product(left, right, (E4M3, E4M3), scaling, fast=False, native=cpu_has_product(scaling))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_forward_and_gradients_against_float64(scaling: str, dtype: torch.dtype) -> None:
    input_TI, weight_OI, bias_O, gradient_TO = inputs(dtype)
    layer = Float8Linear(IN, OUT, bias=True, scaling=scaling).to(dtype)
    layer.weight.data, layer.bias.data = weight_OI, bias_O
    given_TI = input_TI.clone().requires_grad_()
    output_TO = layer(given_TI)
    output_TO.backward(gradient_TO)
    wide_TI, wide_OI, wide_O, wide_TO = (tensor.double() for tensor in (input_TI, weight_OI, bias_O, gradient_TO))
    # Half a step of e4m3 is at most 1/16 of a value, of e5m2 1/8; errors of many terms cancel.
    bound_of_gradient = 0.08 if scaling == "tensorwise" else 0.05
    assert output_TO.dtype == dtype and error(output_TO, wide_TI @ wide_OI.T + wide_O) < 0.05
    assert error(given_TI.grad, wide_TO @ wide_OI) < bound_of_gradient
    assert error(layer.weight.grad, wide_TO.T @ wide_TI) < bound_of_gradient
    torch.testing.assert_close(layer.bias.grad.double(), wide_TO.sum(0), rtol=1e-2, atol=1e-2)


def test_a_scale_for_each_row_keeps_small_rows() -> None:
    """Beside a row that is ten million times as large, a row of a matrix with one scale loses all its bits."""
    left, right = torch.randn(16, IN), torch.randn(16, IN)
    left[0] *= 1e7
    expected = left.double() @ right.double().T
    by_row, by_matrix = (on_this_cpu(left, right, scaling) for scaling in ("rowwise", "tensorwise"))
    assert error(by_row[1:], expected[1:]) < 0.06 and error(by_matrix[1:], expected[1:]) > 0.9


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_eight_bits_can_hold_is_kept_exactly(scaling: str, dtype: torch.dtype) -> None:
    """Small integers times any power of two, and zeros; and nothing is ever clipped."""
    matrix = torch.randint(-3, 4, (32, 16)).float() * 2.0 ** torch.randint(-3, 4, (32, 1)).float()
    matrix[3] = 0
    for size in (1.0, 2.0**-20, 2.0**20):
        rounded, factor = quantized(matrix * size, dtype, scaling)
        assert torch.equal(rounded.float() * factor, matrix * size)
    for largest in torch.linspace(0.9, 2.2, 50):
        rounded, factor = quantized(largest * torch.ones(16, 16), dtype, scaling)
        assert rounded.float().isfinite().all()
        torch.testing.assert_close(rounded.float() * factor, largest * torch.ones(16, 16), rtol=0.13, atol=0)


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_stays_none(scaling: str, poison: float) -> None:
    left, right = torch.randn(16, IN), torch.randn(16, IN)
    left[2, 3] = poison
    assert not on_this_cpu(left, right, scaling)[2].isfinite().any()


@pytest.mark.parametrize(("scaling", "dtype"), [("tensorwise", E4M3), ("tensorwise", E5M2), ("rowwise", E4M3)])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_a_product_in_fp32_of_what_was_rounded(scaling: Scaling, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """It is float64's but for the last bits, and torch's own product where this CPU has it."""
    left_TI, right_OI = inputs(out_dtype)[:2]
    found_TO = product(left_TI, right_OI, (dtype, E4M3), scaling, fast=False, native=False)
    pairs = (quantized(left_TI, dtype, scaling), quantized(right_OI, E4M3, scaling))
    left, right = (rounded.double() * factor.double() for rounded, factor in pairs)
    last_bits = 1e-6 if out_dtype == torch.float32 else 2.0**-8
    assert found_TO.dtype == out_dtype and error(found_TO, left @ right.T) < last_bits
    if not cpu_has_product(scaling):
        pytest.skip(f"torch has no {scaling} product on this CPU")
    own_TO = product(left_TI, right_OI, (dtype, E4M3), scaling, fast=False, native=True)
    assert error(found_TO, own_TO.double()) < last_bits


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_a_cpu_that_refuses_the_product_is_asked_before_the_first_step(
    scaling: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; then neither forward nor backward asks for it again."""
    asked = []

    def refused(*_: object, **__: object) -> Tensor:
        asked.append(1)
        raise RuntimeError("could not create a primitive descriptor for the matmul primitive")

    monkeypatch.setattr(torch, "_scaled_mm", refused)
    cpu_has_product.cache_clear()
    try:
        layers = [Float8Linear(IN, OUT, bias=False, scaling=scaling) for _ in range(2)]
        assert "multiplied in fp32" in product_line(torch.device("cpu"), scaling)
        for layer in layers:
            layer(inputs(torch.float32)[0]).sum().backward()
        assert len(asked) == 1
    finally:
        cpu_has_product.cache_clear()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_it_compiles_into_one_graph(scaling: Scaling, native: bool) -> None:
    if native and not cpu_has_product(scaling):
        pytest.skip(f"torch has no {scaling} product on this CPU")
    input_TI, weight_OI, _, gradient_TO = inputs(torch.bfloat16)
    layer = Float8Linear(IN, OUT, bias=False, scaling=scaling).to(torch.bfloat16)
    layer.weight.data, layer.cpu_has_product = weight_OI, native
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, dynamic=False)):
        layer.weight.grad = None
        given_TI = input_TI.clone().requires_grad_()
        output_TO = run(given_TI)
        output_TO.backward(gradient_TO)
        found.append((output_TO.detach(), given_TI.grad, layer.weight.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-2)


def test_the_ends_of_the_model_stay_as_they_are() -> None:
    blueprint = Blueprint(model=DEEP, float8="rowwise")
    decoder = initial_decoder(blueprint, Reading(sequence_length=uneven.SEQUENCE, document_mask=True), seed=7)
    eight = {name for name, module in decoder.named_modules() if isinstance(module, Float8Linear)}
    parts = ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
    assert eight == {f"blocks_{number}.{part}" for number in (1, 2) for part in parts}
    assert sum(isinstance(module, nn.Linear) for module in decoder.modules()) == 4 * len(parts)


@pytest.mark.parametrize(("scaling", "capability", "needed"), [("tensorwise", (8, 0), "8.9"), ("rowwise", (8, 9), "9.0")])
def test_a_gpu_that_has_no_such_product_is_told_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, scaling: str, capability: tuple[int, int], needed: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    with pytest.raises(UserError, match=rf"precision=fp8: kernels.fp8_scaling={scaling} needs .* {needed} "):
        check_device(torch.device("cuda"), scaling)
    check_device(torch.device("cpu"), scaling)


def train(context: ParallelContext, zero: int, scaling: str) -> list[float]:
    engine = uneven.make_engine(context, zero=zero, precision="fp8", model=DEEP, float8=scaling)
    return [
        engine.train_step(uneven.batches_of_step(step, context), lr=uneven.lr_of(step), step=step).loss for step in range(STEPS)
    ]


@pytest.mark.parametrize(("zero", "world_size", "scaling"), [(1, 1, "rowwise"), (2, 2, "tensorwise"), (3, 2, "rowwise")])
def test_training_stays_near_fp32(zero: int, world_size: int, scaling: str) -> None:
    """Losses of 10 steps stay within 0.03 nats of fp32's."""
    curve, _ = reference(DEEP)
    losses = run_ranks(train, world_size, zero, scaling)[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor([loss for loss, _ in curve]), rtol=0, atol=0.03)
    assert losses != [loss for loss, _ in curve]
