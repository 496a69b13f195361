"""Our side: the checkpoint's decoder, one layer at a time.

Shapes: T tokens, C tokens of a chunk, H hidden, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from train.checkpoint.reader import CheckpointReader
from train.config.kernels import KernelsConfig
from train.config.model import ModelConfig
from train.convert.proof.rows import LOGIT_BYTES, logits_at_once
from train.convert.proof.stored import read_logical
from train.model.blueprint import Blueprint
from train.model.logical import logical_of
from train.model.transformer import Block, Layer, Reading, State, build_layers, materialise


class OurModel:
    """The layers of a checkpoint in fp32, weights rounded to `rounding` first; each is built when it runs and dropped after."""

    def __init__(self, reader: CheckpointReader, model: ModelConfig, rounding: torch.dtype | None) -> None:
        self.model = model
        self._reader, self._rounding = reader, rounding
        reading = Reading(sequence_length=model.max_positions, document_mask=False)
        blueprint = Blueprint(model=model, kernels=KernelsConfig(logits_bytes=LOGIT_BYTES))
        *self._layers, self._head = build_layers(blueprint, reading)

    def layers(
        self, states: Sequence[State], reading: Reading, *, what: str | None = None
    ) -> Iterator[tuple[str, list[Tensor]]]:
        """Yield each layer's name and the hidden states [T, H] of every micro-batch after it, up to the final norm.

        `what` is the name of a progress bar over the layers; None: there is none.
        """
        for layer in tqdm(self._layers, desc=what, unit="layer", disable=True if what is None else None):
            states = self._advance(layer, states, reading)
            yield layer.name, [state[0] for state in states]

    def hidden(self, states: Sequence[State], reading: Reading) -> list[Tensor]:
        """Hidden states [T, H] of every micro-batch, ready for the head."""
        for _, hidden in self.layers(states, reading):
            last = hidden
        return last

    @torch.inference_mode()
    def logits(self, hidden_TH: Tensor) -> Iterator[Tensor]:
        """[C, real vocabulary or labels] of some positions after the others."""
        with self._filled(self._head) as head:
            for hidden_CH in hidden_TH.split(logits_at_once(self.model)):
                yield head.logits(hidden_CH)[:, : len(self.model.labels) or self.model.vocab_size]

    @torch.inference_mode()
    def loss(self, states: Sequence[State], reading: Reading) -> float:
        """Sum of the losses of all targets of some micro-batches."""
        hidden = self.hidden(states, reading)
        with self._filled(self._head) as head:
            parts = zip(hidden, states, strict=True)
            return sum(head((hidden_TH, *state[1:]))[1].item() for hidden_TH, state in parts)

    @torch.inference_mode()
    def _advance(self, layer: Layer, states: Sequence[State], reading: Reading) -> list[State]:
        with self._filled(layer) as module:
            if isinstance(module, Block):
                module.deriver.read_as(reading)
            return [module(state) for state in states]

    @contextmanager
    def _filled(self, layer: Layer) -> Iterator[nn.Module]:
        """The layer with its weights; a tied head asks for the embedding's by its logical name."""
        module = layer.build().requires_grad_(False).eval()

        def weight(empty: nn.Parameter) -> Tensor:
            name = logical_of(empty).name
            return read_logical(self._reader, name, rounding=self._rounding, dtype=torch.float32).view(empty.shape)

        materialise(module, weight)
        try:
            yield module
        finally:
            for owner in module.modules():  # a layer holds methods of its own, and would keep its weights until a collection
                owner._parameters.clear()
