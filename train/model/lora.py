"""Adapters beside a linear layer (LoRA, rsLoRA, DoRA), computed as PEFT does, on any number of tensor ranks.

A layer with an adapter is the same layer with more parameters of its own: its weight keeps its logical name, and under
ZeRO 3 all of them are gathered together, which DoRA needs.

Sources: Hu et al. 2021, Kalajdzievski 2023, Liu et al. 2024. Shapes: T tokens, I in, O out, R rank, P projections.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config.adapter import LoraConfig
from train.model.adapters import MAGNITUDE, WEIGHT, A, B, Projections, projections_of, shapes_beside, trains
from train.model.blueprint import Blueprint
from train.model.crossings import all_rows, own_draws, own_rows_of_sum, replicated, sum_of_parts
from train.model.logical import LogicalTensor, logical_of, tag


class Adapted(nn.Module):
    """Stands before the class of a linear layer, whose product it adds to. `attach` is called once it is built."""

    def attach(self, name: str, blueprint: Blueprint, *, reduces: bool) -> None:
        """Add the adapter's parameters, without values, to a layer whose weight is tagged.

        `reduces`: the ranks hold parts of the layer's input, not of its output.
        """
        lora, weight = blueprint.lora, logical_of(self.weight)
        self.lora, self.tensor, self.reduces, self.draws = lora, blueprint.tensor, reduces, f"{name}.lora"
        *out, self.in_size = weight.local_shape
        self.projections = projections_of(name, weight.shape[:-1])
        shapes = shapes_beside(name, weight.shape, lora)
        part = {"index": weight.index, "parts": weight.parts}
        first = len(shapes[f"{name}{A}"]) - 1  # the axis of its input
        self.lora_a = _empty(f"{name}{A}", shapes, part | {"dim": first} if reduces else {})
        self.lora_b = _empty(f"{name}{B}", shapes, {} if reduces else part | {"dim": weight.dim})
        self.register_parameter("lora_magnitude", None)
        if lora.dora:
            self.lora_magnitude = _empty(f"{name}{MAGNITUDE}", shapes, {} if reduces else part | {"dim": weight.dim})

    def forward(self, inputs_TI: Tensor) -> Tensor:
        """The layer's product and the adapter's: [T, I] -> [T, O], the rank's part of both."""
        output_TO = super().forward(inputs_TI)
        dropped_TI = self._dropped(inputs_TI)
        beside_TO = self._beside(dropped_TI) * self.lora.scaling
        if self.lora_magnitude is None:
            return output_TO + beside_TO
        # DoRA of a dropped input has its frozen part from the dropped input as well.
        frozen_TO = output_TO if dropped_TI is inputs_TI else super().forward(dropped_TI)
        if self.bias is not None:
            frozen_TO = frozen_TO - self.bias
        stretch_O = replicated(self.lora_magnitude, self.tensor, partial=False) if self.reduces else self.lora_magnitude
        stretch_O = (stretch_O / self._lengths()).flatten()
        return output_TO + (stretch_O - 1) * frozen_TO + stretch_O * beside_TO

    def _dropped(self, inputs_TI: Tensor) -> Tensor:
        rate = self.lora.dropout if self.training else 0.0
        if not rate:
            return inputs_TI
        # Rows are dropped alike on ranks that hold the same ones; of columns each rank has its own.
        with own_draws(self.tensor, self.draws, dropout=rate) if self.reduces else nullcontext():
            return F.dropout(inputs_TI, rate)

    def _beside(self, inputs_TI: Tensor) -> Tensor:
        """What the two matrices make of the input, not scaled."""
        if self.reduces:
            narrow_TR = own_rows_of_sum(F.linear(inputs_TI, self.lora_a), self.tensor)
            return F.linear(narrow_TR, replicated(self.lora_b, self.tensor, partial=False))
        # The ranks share [T, R] among them, not [T, I].
        first = replicated(self.lora_a, self.tensor, partial=False).reshape(-1, self.in_size)
        narrow_TX = all_rows(F.linear(inputs_TI, first), self.tensor)
        parts = []
        for narrow_TR, second in zip(narrow_TX.chunk(self.projections.count, dim=1), self._seconds(), strict=True):
            parts.append(F.linear(narrow_TR, second.reshape(-1, second.shape[-1])).unflatten(1, second.shape[:-1]))
        return _joined(parts, 1 + self.projections.axis).flatten(1)

    def _seconds(self) -> tuple[Tensor, ...]:
        """The second matrix of each projection, with the axes of its output."""
        if self.projections.count == 1:
            return (self.lora_b,)
        return self.lora_b.split(self.projections.sections, dim=self.projections.axis)

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """Lengths of the rows of the merged weight, of the magnitude's shape and dtype; a constant to the gradient."""
        rows = self.weight.view(*self.lora_b.shape[:-1], self.in_size)
        rows = rows.float() + self.lora.scaling * product(self.lora_a.float(), self.lora_b.float(), self.projections)
        squares = rows.square().sum(dim=-1)
        if self.reduces:
            squares = sum_of_parts(squares, self.tensor)
        return squares.sqrt().to(self.lora_magnitude.dtype)


@cache
def with_adapter(layer: type[nn.Module]) -> type[nn.Module]:
    """The class of a linear layer with an adapter."""
    return type(f"Lora{layer.__name__}", (Adapted, layer), {"__doc__": f"{layer.__name__} with an adapter."})


def product(first: Tensor, second: Tensor, projections: Projections) -> Tensor:
    """What the two matrices of an adapter add to the weight, not scaled: [... out axes, I]."""
    if projections.count == 1:
        return second @ first
    seconds = second.split(projections.sections, dim=projections.axis)
    return torch.cat([part @ matrix for part, matrix in zip(seconds, first, strict=True)], dim=projections.axis)


def merged(layer: str, weight: Tensor, adapter: dict[str, Tensor], lora: LoraConfig) -> Tensor:
    """The weight of a layer with its adapter taken in, all of their logical shapes; `adapter` by logical name."""
    projections = projections_of(layer, tuple(weight.shape[:-1]))
    whole = weight + product(adapter[f"{layer}{A}"], adapter[f"{layer}{B}"], projections) * lora.scaling
    if not lora.dora:
        return whole
    return whole * (adapter[f"{layer}{MAGNITUDE}"] / row_lengths(whole)).unsqueeze(-1)


def row_lengths(weight: Tensor) -> Tensor:
    """Length of every row of a weight: where the magnitudes of DoRA begin."""
    return torch.linalg.vector_norm(weight, dim=-1)


def settings_of(module: nn.Module) -> LoraConfig | None:
    """The settings of the adapters in `module`; None: it has none."""
    return next((inner.lora for inner in module.modules() if isinstance(inner, Adapted)), None)


def freeze(module: nn.Module, blueprint: Blueprint) -> nn.Module:
    """Take the gradient from all that does not train; returns the module."""
    for parameter in module.parameters():
        parameter.requires_grad_(trains(logical_of(parameter).name, lora=blueprint.lora, frozen=blueprint.frozen))
    return module


def base_of(magnitude: str) -> str:
    """Logical name of the weight that a magnitude belongs to."""
    return magnitude.removesuffix(MAGNITUDE) + WEIGHT


def _empty(name: str, shapes: dict[str, tuple[int, ...]], part: dict[str, int]) -> nn.Parameter:
    logical = LogicalTensor(name=name, shape=shapes[name], **part)
    parameter = nn.Parameter(torch.empty(logical.local_shape))
    tag(parameter, logical)
    return parameter


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
