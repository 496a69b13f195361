"""A linear layer whose three products, forward and backward, are of 8-bit floats (torch's scaled matrix product).

Both factors are scaled along the contracted axis before they are rounded, and the product is scaled back. `tensorwise`:
one scale a matrix, activations and weights in e4m3, gradients in e5m2, which has less precision and more range.
`rowwise`: a scale for each row of the left and column of the right factor, all in e4m3. Scales are powers of two, so
scaling itself rounds nothing, and are found anew for each product. Where the CPU refuses such a product the rounded
values are multiplied in fp32: the same numbers, for checking only.

Sources: Micikevicius et al. 2022 (the formats); the recipes of torchao.float8. Shapes: T tokens, I in, O out.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from conf.errors import UserError
from train.model.empty import EmptyLinear

Scaling: TypeAlias = Literal["tensorwise", "rowwise"]
SMALLEST = 1e-12  # of the largest value of a row: a row of zeros has a scale too
CAPABILITY: dict[Scaling, tuple[int, int]] = {"tensorwise": (8, 9), "rowwise": (9, 0)}


def check_device(device: torch.device, scaling: Scaling) -> None:
    """Raises UserError when the GPU has no such products. On a CPU they are slower than those of bf16."""
    if device.type != "cuda":
        return
    found, needed = torch.cuda.get_device_capability(device), CAPABILITY[scaling]
    if found < needed:
        raise UserError(
            f"precision=fp8: kernels.fp8_scaling={scaling} needs a GPU of compute capability {needed[0]}.{needed[1]} "
            f"(8.9 is Ada, 9.0 Hopper); {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; use precision=bf16"
        )


@cache
def cpu_has_product(scaling: Scaling) -> bool:
    """Whether torch's scaled product runs on this CPU, asked once a process by multiplying 16 x 16 zeros.

    torch hands it to oneDNN on every CPU that has AMX, and oneDNN has it only where it may use AVX-512: restricted to
    AVX2 (ONEDNN_MAX_CPU_ISA) such a CPU ends the first step with a RuntimeError. Other CPUs have a product of torch's own.
    """
    # In so many words: ZeRO 3 changes the device and dtype that constructors choose while it builds a model.
    zeros = torch.zeros(16, 16, device="cpu")
    scale = torch.ones((16, 1) if scaling == "rowwise" else (), device="cpu").float()
    left_dtypes = (torch.float8_e4m3fn, torch.float8_e5m2) if scaling == "tensorwise" else (torch.float8_e4m3fn,)
    try:
        for dtype in left_dtypes:
            left, right = zeros.to(dtype), zeros.to(torch.float8_e4m3fn)
            for out_dtype in (torch.float32, torch.bfloat16):
                torch._scaled_mm(left, right.t(), scale_a=scale, scale_b=scale.t(), out_dtype=out_dtype)
    except RuntimeError:
        return False
    return True


def product_line(device: torch.device, scaling: Scaling) -> str:
    """How the products are computed, human-readable."""
    if device.type == "cuda" or cpu_has_product(scaling):
        return f"8-bit floats scaled {scaling}"
    return f"rounded to 8-bit floats scaled {scaling}, multiplied in fp32: this CPU has no 8-bit product"


def quantized(matrix: Tensor, dtype: torch.dtype, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """[M, K] as 8-bit floats, row-major, and the fp32 factor that gives its values back: [] or, rowwise, [M, 1]."""
    magnitudes = matrix.abs()
    largest = magnitudes.amax() if scaling == "tensorwise" else magnitudes.amax(dim=1, keepdim=True)
    steps = torch.log2(largest.float().clamp(min=SMALLEST) / torch.finfo(dtype).max)
    factor = torch.exp2(torch.ceil(steps))  # rounded up: nothing leaves the range of the format
    return (matrix.float() / factor).to(dtype).contiguous(), factor


def product(
    left_MK: Tensor,
    right_NK: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    scaling: Scaling,
    *,
    fast: bool,
    native: bool,
) -> Tensor:
    """left x right^T, [M, N] in the dtype of `left`, by way of the two 8-bit formats; K and N are multiples of 16.

    `fast` lets Hopper add up in fewer bits. `native` False computes with fp32 what the device has no product for.
    """
    left, left_scale = quantized(left_MK, dtypes[0], scaling)
    right, right_scale = quantized(right_NK, dtypes[1], scaling)
    if not native:
        return (left.float() @ right.float().t() * left_scale * right_scale.t()).to(left_MK.dtype)
    return torch._scaled_mm(
        left,
        right.t(),  # the second factor has to be column-major
        scale_a=left_scale,
        scale_b=right_scale.t() if scaling == "rowwise" else right_scale,
        out_dtype=left_MK.dtype,
        use_fast_accum=fast,
    )


class _Product(torch.autograd.Function):
    """[T, I] x [O, I] -> [T, O] with both gradients."""

    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, weight_OI: Tensor, scaling: Scaling, native: bool) -> Tensor:
        ctx.save_for_backward(input_TI, weight_OI)
        ctx.scaling, ctx.native = scaling, native
        return product(input_TI, weight_OI, (torch.float8_e4m3fn, torch.float8_e4m3fn), scaling, fast=True, native=native)

    @staticmethod
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        input_TI, weight_OI = ctx.saved_tensors
        of_gradients = torch.float8_e5m2 if ctx.scaling == "tensorwise" else torch.float8_e4m3fn
        dtypes = (of_gradients, torch.float8_e4m3fn)
        of_input, of_weight = ctx.needs_input_grad[:2]  # a frozen weight needs none, nor does what only frozen ones made
        return (
            product(gradient_TO, weight_OI.t(), dtypes, ctx.scaling, fast=False, native=ctx.native) if of_input else None,
            product(gradient_TO.t(), input_TI.t(), dtypes, ctx.scaling, fast=False, native=ctx.native) if of_weight else None,
            None,
            None,
        )


class Float8Linear(EmptyLinear):
    """[T, in] -> [T, out]; weight, bias, input and output as a plain linear layer's. T, in and out are multiples of 16."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, scaling: Scaling) -> None:
        super().__init__(in_size, out_size, bias=bias)
        self.scaling = scaling
        self.cpu_has_product = cpu_has_product(scaling)  # asked here, since a traced step cannot ask

    def forward(self, input_TI: Tensor) -> Tensor:
        """The product, and the bias in the dtype of the input."""
        output_TO = _Product.apply(input_TI, self.weight, self.scaling, input_TI.is_cuda or self.cpu_has_product)
        return output_TO if self.bias is None else output_TO + self.bias
