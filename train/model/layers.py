"""Norms, rotary positions, MLPs: the parts of a block that are not attention.

Shapes: T tokens, H hidden, N heads, D head size, F inner width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config.model import ModelConfig, RopeConfig
from train.model.blueprint import Blueprint
from train.model.crossings import replicated
from train.model.logical import LogicalTensor, tag
from train.model.tensor_parallel import expand_linear, reduce_linear


class Norm(nn.Module):
    """LayerNorm with bias, or RMSNorm; the statistics are taken in fp32.

    `of_heads`: an RMSNorm of single heads [..., D], of which a tensor rank has its own, instead of hidden states [T, H].
    """

    def __init__(self, name: str, blueprint: Blueprint, *, of_heads: bool = False) -> None:
        super().__init__()
        model = blueprint.model
        self.epsilon, self.one_plus = model.norm_epsilon, model.norm_one_plus
        self.tensor, self.of_heads = blueprint.tensor, of_heads
        shape = (model.head_dim if of_heads else model.hidden_size,)
        self.weight = nn.Parameter(torch.empty(shape))
        tag(self.weight, LogicalTensor(name=f"{name}.weight", shape=shape))
        self.register_parameter("bias", None)
        if model.norm == "layer" and not of_heads:
            self.bias = nn.Parameter(torch.empty(shape))
            tag(self.bias, LogicalTensor(name=f"{name}.bias", shape=shape))

    def forward(self, states: Tensor) -> Tensor:
        """Normalise along the last dimension; same shape and dtype."""
        weight = replicated(self.weight, self.tensor, partial=self.of_heads)
        bias = None if self.bias is None else replicated(self.bias, self.tensor, partial=False)
        if not self.one_plus:
            return self._normalise(states, weight, bias)
        # In fp32, or the sum would lose what a weight near 0 is stored for.
        bias = None if bias is None else bias.float()
        return self._normalise(states.float(), 1 + weight.float(), bias).to(states.dtype)

    def _normalise(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return F.rms_norm(states, weight.shape, weight, self.epsilon)
        return F.layer_norm(states, weight.shape, weight, bias, self.epsilon)


def rotary_frequencies(head_size: int, rope: RopeConfig) -> Tensor:
    """Angular frequency of each rotated pair of a head: fp32 [D/2], fewer where a part of the head is rotated.

    Su et al. 2021; linear divides all frequencies by `factor` (Chen et al. 2023); the llama3 stretch as in Meta's release
    of Llama 3.1: wavelengths longer than original / low_frequency_factor are divided by `factor`, shorter than original /
    high_frequency_factor kept, between them blended.
    """
    rotated = rope.rotated_size(head_size)
    exponent = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    frequency = 1.0 / (rope.base**exponent)
    if rope.scaling == "none":
        return frequency
    if rope.scaling == "linear":
        return frequency / rope.factor
    original = rope.original_max_positions
    turns = original * frequency / (2 * math.pi)
    blend = (turns - rope.low_frequency_factor) / (rope.high_frequency_factor - rope.low_frequency_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequency / rope.factor + blend * frequency


def rotary_tables(positions_T: Tensor, frequency: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position: each [T, 1, R] for R rotated dimensions, both halves of them alike."""
    angle_TD = (positions_T.float().unsqueeze(1) * frequency).repeat(1, 2).unsqueeze(1)
    return angle_TD.cos().to(dtype), angle_TD.sin().to(dtype)


class Rotary:
    """The rotary tables of a model's layers, made once for all layers with the same settings."""

    def __init__(self, model: ModelConfig) -> None:
        windows = dict.fromkeys(model.window_of(number) for number in range(model.num_layers))
        self.ropes = {window: model.rope_of(window) for window in windows}
        self.frequencies = {rope: rotary_frequencies(model.head_dim, rope) for rope in self.ropes.values() if rope is not None}

    def tables(self, positions_T: Tensor, dtype: torch.dtype) -> dict[int | None, tuple[Tensor, Tensor] | None]:
        """Cosine and sine of every position by the layer's window; None where nothing is rotated."""
        made = {}
        for rope, frequency in self.frequencies.items():
            self.frequencies[rope] = frequency.to(positions_T.device)  # moved once
            made[rope] = rotary_tables(positions_T, self.frequencies[rope], dtype)
        return {window: made.get(rope) for window, rope in self.ropes.items()}


def rotate(states_TND: Tensor, cosine_T1R: Tensor, sine_T1R: Tensor) -> Tensor:
    """Turn each pair (i, i + R/2) of a head by its position's angle; dimensions from R on stay as they are.

    Half rotation, as Hugging Face's Llama.
    """
    rotated = cosine_T1R.shape[-1]
    turned = states_TND[..., :rotated]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine_T1R + torch.cat((-second, first), dim=-1) * sine_T1R
    return turned if rotated == states_TND.shape[-1] else torch.cat((turned, states_TND[..., rotated:]), dim=-1)


_GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _GELU_TANH,
    "gelu_exact": F.gelu,
    "swiglu": F.silu,
    "geglu": _GELU_TANH,
}


class PlainMLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, name: str, blueprint: Blueprint) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[blueprint.model.mlp]
        self.up = expand_linear(f"{name}.up", (blueprint.model.ffn_size,), blueprint, bias=blueprint.model.bias)
        self.down = reduce_linear(f"{name}.down", blueprint.model.ffn_size, blueprint, bias=blueprint.model.bias)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down(self.activation(self.up(hidden_TH)))


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)); gate and up are one matrix."""

    def __init__(self, name: str, blueprint: Blueprint) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[blueprint.model.mlp]
        self.gate_up = expand_linear(
            f"{name}.gate_up", (2, blueprint.model.ffn_size), blueprint, cut_dim=1, bias=blueprint.model.bias
        )
        self.down = reduce_linear(f"{name}.down", blueprint.model.ffn_size, blueprint, bias=blueprint.model.bias)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        gate_TF, up_TF = self.gate_up(hidden_TH).chunk(2, dim=-1)
        return self.down(self.activation(gate_TF) * up_TF)
