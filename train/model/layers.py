"""Norms, rotary positions, MLPs: the parts of a block that are not attention.

Shapes: T tokens, H hidden, N heads, D head size, F inner width of the MLP.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config.model import RopeConfig
from train.model.blueprint import Blueprint
from train.model.logical import LogicalTensor, tag
from train.model.tensor_parallel import expand_linear, reduce_linear, replicated


class Norm(nn.Module):
    """LayerNorm with bias, or RMSNorm; the statistics are taken in fp32."""

    def __init__(self, name: str, blueprint: Blueprint) -> None:
        super().__init__()
        model = blueprint.model
        self.epsilon = model.norm_epsilon
        self.tensor = blueprint.tensor
        self.weight = nn.Parameter(torch.empty(model.hidden_size))
        tag(self.weight, LogicalTensor(name=f"{name}.weight", shape=(model.hidden_size,)))
        self.register_parameter("bias", None)
        if model.norm == "layer":
            self.bias = nn.Parameter(torch.empty(model.hidden_size))
            tag(self.bias, LogicalTensor(name=f"{name}.bias", shape=(model.hidden_size,)))

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """Normalise each row; same shape and dtype."""
        weight = replicated(self.weight, self.tensor, partial=False)
        if self.bias is None:
            return F.rms_norm(hidden_TH, weight.shape, weight, self.epsilon)
        bias = replicated(self.bias, self.tensor, partial=False)
        return F.layer_norm(hidden_TH, weight.shape, weight, bias, self.epsilon)


def rotary_frequencies(head_size: int, rope: RopeConfig) -> Tensor:
    """Angular frequency of each pair of a head: fp32 [D/2].

    Su et al. 2021; the llama3 stretch as in Meta's release of Llama 3.1: wavelengths longer than
    original / low_frequency_factor are divided by `factor`, shorter than original / high_frequency_factor kept, between
    them blended.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    frequency = 1.0 / (rope.base**exponent)
    if rope.scaling == "none":
        return frequency
    original = rope.original_max_positions
    turns = original * frequency / (2 * math.pi)
    blend = (turns - rope.low_frequency_factor) / (rope.high_frequency_factor - rope.low_frequency_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequency / rope.factor + blend * frequency


def rotary_tables(positions_T: Tensor, frequency: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position: each [T, 1, D], both halves of a head alike."""
    angle_TD = (positions_T.float().unsqueeze(1) * frequency).repeat(1, 2).unsqueeze(1)
    return angle_TD.cos().to(dtype), angle_TD.sin().to(dtype)


def rotate(states_TND: Tensor, cosine_T1D: Tensor, sine_T1D: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of a head by its position's angle (half rotation, as Hugging Face's Llama)."""
    first, second = states_TND.chunk(2, dim=-1)
    return states_TND * cosine_T1D + torch.cat((-second, first), dim=-1) * sine_T1D


class GeluMLP(nn.Module):
    """down(gelu(up(x))), tanh form as GPT-2."""

    def __init__(self, name: str, blueprint: Blueprint) -> None:
        super().__init__()
        self.up = expand_linear(f"{name}.up", (blueprint.model.ffn_size,), blueprint, bias=blueprint.model.bias)
        self.down = reduce_linear(f"{name}.down", blueprint.model.ffn_size, blueprint, bias=blueprint.model.bias)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down(F.gelu(self.up(hidden_TH), approximate="tanh"))


class SwiGluMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix."""

    def __init__(self, name: str, blueprint: Blueprint) -> None:
        super().__init__()
        self.gate_up = expand_linear(
            f"{name}.gate_up", (2, blueprint.model.ffn_size), blueprint, cut_dim=1, bias=blueprint.model.bias
        )
        self.down = reduce_linear(f"{name}.down", blueprint.model.ffn_size, blueprint, bias=blueprint.model.bias)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        gate_TF, up_TF = self.gate_up(hidden_TH).chunk(2, dim=-1)
        return self.down(F.silu(gate_TF) * up_TF)


MLPS = {"gelu": GeluMLP, "swiglu": SwiGluMLP}
