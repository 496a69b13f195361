"""Norms and MLPs: the parts of a block that are not attention.

Shapes: T tokens, H hidden, N heads, D head size, F inner width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model.blueprint import Blueprint
from train.model.crossings import replicated, sum_for_parts
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


class NormAcrossHeads(nn.Module):
    """RMSNorm over all heads of a token together, as OLMo 2; a tensor rank has the weights of its own heads."""

    def __init__(self, name: str, num_heads: int, blueprint: Blueprint) -> None:
        super().__init__()
        model, tensor = blueprint.model, blueprint.tensor
        self.epsilon, self.one_plus, self.tensor = model.norm_epsilon, model.norm_one_plus, tensor
        self.width = num_heads * model.head_dim
        self.weight = nn.Parameter(torch.empty(self.width // tensor.size))
        part = {"index": tensor.rank, "parts": tensor.size}
        tag(self.weight, LogicalTensor(name=f"{name}.weight", shape=(self.width,), **part))

    def forward(self, states_TND: Tensor) -> Tensor:
        """Normalise the heads that are here by the mean square of all: same shape and dtype."""
        states, weight = states_TND.flatten(1), self.weight
        if self.one_plus:  # in fp32, as `Norm`
            states, weight = states.float(), 1 + weight.float()
        if self.tensor.size == 1:
            normed = F.rms_norm(states, weight.shape, weight, self.epsilon)
        else:
            states = states.float()
            squares_T1 = sum_for_parts(states.square().sum(dim=1, keepdim=True), self.tensor)
            normed = states * torch.rsqrt(squares_T1 / self.width + self.epsilon) * weight
        return normed.to(states_TND.dtype).view(states_TND.shape)


_GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _GELU_TANH,
    "gelu_exact": F.gelu,
    "swiglu": F.silu,
    "geglu": _GELU_TANH,
    "geglu_exact": F.gelu,
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
