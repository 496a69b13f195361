"""A linear layer whose three products, forward and backward, are of 8-bit floats (torch's scaled matrix product).

Both factors are scaled along the contracted axis before they are rounded, and the product is scaled back. `tensorwise`:
one scale a matrix, activations and weights in e4m3, gradients in e5m2, which has less precision and more range.
`rowwise`: a scale for each row of the left and column of the right factor, all in e4m3. Scales are powers of two, so
scaling itself rounds nothing, and are found anew for each product.

Sources: Micikevicius et al. 2022 (the formats); the recipes of torchao.float8. Shapes: T tokens, I in, O out.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from conf.errors import UserError

Scaling: TypeAlias = Literal["tensorwise", "rowwise"]
SMALLEST = 1e-12  # of the largest value of a row: a row of zeros has a scale too
CAPABILITY: dict[Scaling, tuple[int, int]] = {"tensorwise": (8, 9), "rowwise": (9, 0)}


def check_device(device: torch.device, scaling: Scaling) -> None:
    """Raises UserError when the GPU has no such products. A CPU has them, slower than those of bf16."""
    if device.type != "cuda":
        return
    found, needed = torch.cuda.get_device_capability(device), CAPABILITY[scaling]
    if found < needed:
        raise UserError(
            f"precision=fp8: kernels.fp8_scaling={scaling} needs a GPU of compute capability {needed[0]}.{needed[1]} "
            f"(8.9 is Ada, 9.0 Hopper); {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; use precision=bf16"
        )


def quantized(matrix: Tensor, dtype: torch.dtype, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """[M, K] as 8-bit floats, row-major, and the fp32 factor that gives its values back: [] or, rowwise, [M, 1]."""
    magnitudes = matrix.abs()
    largest = magnitudes.amax() if scaling == "tensorwise" else magnitudes.amax(dim=1, keepdim=True)
    steps = torch.log2(largest.float().clamp(min=SMALLEST) / torch.finfo(dtype).max)
    factor = torch.exp2(torch.ceil(steps))  # rounded up: nothing leaves the range of the format
    return (matrix.float() / factor).to(dtype).contiguous(), factor


def product(
    left_MK: Tensor, right_NK: Tensor, dtypes: tuple[torch.dtype, torch.dtype], scaling: Scaling, *, fast: bool
) -> Tensor:
    """left x right^T, [M, N] in the dtype of `left`, by way of the two 8-bit formats; K and N are multiples of 16.

    `fast` lets Hopper add up in fewer bits.
    """
    left, left_scale = quantized(left_MK, dtypes[0], scaling)
    right, right_scale = quantized(right_NK, dtypes[1], scaling)
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
    def forward(ctx: Any, input_TI: Tensor, weight_OI: Tensor, scaling: Scaling) -> Tensor:
        ctx.save_for_backward(input_TI, weight_OI)
        ctx.scaling = scaling
        return product(input_TI, weight_OI, (torch.float8_e4m3fn, torch.float8_e4m3fn), scaling, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        input_TI, weight_OI = ctx.saved_tensors
        of_gradients = torch.float8_e5m2 if ctx.scaling == "tensorwise" else torch.float8_e4m3fn
        dtypes = (of_gradients, torch.float8_e4m3fn)
        of_input, of_weight = ctx.needs_input_grad[:2]  # a frozen weight needs none, nor does what only frozen ones made
        return (
            product(gradient_TO, weight_OI.t(), dtypes, ctx.scaling, fast=False) if of_input else None,
            product(gradient_TO.t(), input_TI.t(), dtypes, ctx.scaling, fast=False) if of_weight else None,
            None,
        )


class Float8Linear(nn.Linear):
    """[T, in] -> [T, out]; weight, bias, input and output as a plain linear layer's. T, in and out are multiples of 16."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, scaling: Scaling) -> None:
        super().__init__(in_size, out_size, bias=bias)
        self.scaling = scaling

    def forward(self, input_TI: Tensor) -> Tensor:
        """The product, and the bias in the dtype of the input."""
        output_TO = _Product.apply(input_TI, self.weight, self.scaling)
        return output_TO if self.bias is None else output_TO + self.bias
