"""FLOPs of training: what the products of a model cost for one token, forward and backward, also where only a part trains.

Counted as in the PaLM paper, appendix B: matrix products alone, without what is computed again to spare memory, and without
what is computed once for all tokens of a step (DoRA's lengths of rows). Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from train.config.adapter import LoraConfig
from train.config.model import ModelConfig
from train.model.adapters import MAGNITUDE, WEIGHT, A, B, Shape, adapted, shapes_beside, trained_shapes
from train.model.cost import EMBEDDING, LABEL_HEAD, OUTPUT_HEAD, head_width, parameter_shapes


def flops_per_token(
    model: ModelConfig, sequence_length: int, *, lora: LoraConfig | None = None, frozen: Sequence[str] = ()
) -> tuple[int, int]:
    """Training FLOPs of one token: (attention counted in full, attention counted causally).

    A product with a matrix costs 2 for each of its numbers forward, 2 for the gradient of its input where something trains
    below it, 2 for its own where it trains: 6 where all does. Attention costs 4 x width x keys in each layer forward and twice
    that backward. Keys in full are the sequence's, or the window's where a layer has one; causally the mean over the queries
    of those that they may see.
    """
    walk = _Walk(model, lora=lora, frozen=frozen)
    passes = [1 + 2 * has_gradient for has_gradient in walk.to_the_loss()]
    width = model.num_heads * model.head_dim
    full = causal = walk.flops
    for number, times in enumerate(passes):
        keys = min(model.window_of(number) or sequence_length, sequence_length)
        full += 4 * width * keys * times
        # The first queries see less than a window.
        causal += 2 * width * (2 * keys - keys * keys // sequence_length) * times
    return full, causal


class _Walk:
    """The matrix products of a forward pass in their order, counted with what the backward pass makes of them."""

    def __init__(self, model: ModelConfig, *, lora: LoraConfig | None, frozen: Sequence[str]) -> None:
        self.model, self.lora = model, lora
        self.shapes = parameter_shapes(model)
        self.trained = trained_shapes(model, lora=lora, frozen=frozen)
        self.flops = 0

    def to_the_loss(self) -> list[bool]:
        """Walk through the whole model; whether the attention of each layer has a gradient."""
        has_gradient = any(name.startswith("embedding.") for name in self.trained)
        attention = []
        for number in range(self.model.num_layers):
            block, entering = f"blocks.{number}", has_gradient
            normed = self.through(f"{block}.attention_norm", has_gradient=entering)
            mixed = self.through(
                f"{block}.attention.qkv", f"{block}.attention.query_norm", f"{block}.attention.key_norm", has_gradient=normed
            )
            attention.append(mixed)
            attended = self.through(f"{block}.attention.output", f"{block}.attention_post_norm", has_gradient=mixed)
            inner = {"sequential": attended, "parallel": entering, "parallel_shared": normed}[self.model.residual]
            mlp = (f"{block}.{layer}" for layer in ("mlp_norm", "mlp.gate_up", "mlp.up", "mlp.down", "mlp_post_norm"))
            has_gradient = self.through(*mlp, has_gradient=inner) or attended
        has_gradient = self.through("final_norm", has_gradient=has_gradient)
        head = LABEL_HEAD if self.model.labels else EMBEDDING if self.model.tied_head else OUTPUT_HEAD
        self._product(head, (head_width(self.model), self.model.hidden_size), has_gradient=has_gradient)
        return attention

    def through(self, *layers: str, has_gradient: bool) -> bool:
        """Go through those of these layers that the model has; whether what comes out has a gradient, as what goes in."""
        for layer in layers:
            weight = self.shapes.get(f"{layer}{WEIGHT}")
            if weight is None:
                continue
            if len(weight) > 1:
                self._product(f"{layer}{WEIGHT}", weight, has_gradient=has_gradient)
                if self.lora is not None and adapted(layer, self.lora):
                    beside = shapes_beside(layer, weight, self.lora)
                    first, second = f"{layer}{A}", f"{layer}{B}"
                    if self.lora.dora and self.lora.dropout:  # the frozen matrix is multiplied with what is dropped as well
                        self._product(f"{layer}{WEIGHT}", weight, has_gradient=has_gradient)
                    self._product(first, beside[first], has_gradient=has_gradient)
                    self._product(second, beside[second], has_gradient=has_gradient or first in self.trained)
            tensors = (WEIGHT, ".bias", A, B, MAGNITUDE)
            has_gradient = has_gradient or any(f"{layer}{tensor}" in self.trained for tensor in tensors)
        return has_gradient

    def _product(self, name: str, matrix: Shape, *, has_gradient: bool) -> None:
        """Count the product of a token with a matrix; `has_gradient`: whether its input has one."""
        self.flops += 2 * prod(matrix) * (1 + has_gradient + (name in self.trained))
