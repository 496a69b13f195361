"""Weights into a decoder in one process, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from conf.errors import UserError
from train.model.blueprint import Blueprint
from train.model.logical import logical_of
from train.model.transformer import Decoder, Reading, build_layers, materialise
from train.parallel import ALONE, TensorRanks
from train.precision import resolve_precision

if TYPE_CHECKING:  # the model's settings are enough for a decoder; the whole configuration is only named
    from train.config.model import ModelConfig


class WeightReader(Protocol):
    """What a checkpoint gives to a reader of weights."""

    model: ModelConfig

    def read(self, name: str, kind: str = "weight") -> Tensor:
        """The fp32 tensor of a logical name, of its logical shape."""


def resolve_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that `name` asks for; auto is CUDA when this machine has it.

    Raises UserError when CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: this machine has no usable CUDA device; use device=auto or device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_dtype(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> torch.dtype:
    """The dtype of weights and activations; auto is what `precision=auto` is on this device."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[resolve_precision(name, device.type).precision]


def check_divisible(model: ModelConfig, tensor: int) -> None:
    """Raise UserError when the model does not come out even over `tensor` ranks."""
    for name, amount in (("kv_heads", model.kv_heads), ("ffn_size", model.ffn_size), ("vocabulary", model.padded_vocab_size)):
        if amount % tensor:
            raise UserError(f"tensor={tensor}: must divide the checkpoint's {name}, {amount}; take another number of ranks")


def load_decoder(
    reader: WeightReader,
    dtype: torch.dtype,
    *,
    device: torch.device,
    reading: Reading | None = None,
    tensor: TensorRanks = ALONE,
) -> Decoder:
    """The checkpoint's model on `device`, in evaluation mode and without gradients; of it, this tensor rank's part.

    `reading` matters to `Decoder.forward` alone; None: one sequence of the longest that the model reads.
    """
    model = reader.model
    if reading is None:
        reading = Reading(sequence_length=model.max_positions, document_mask=False)
    blueprint = Blueprint(model=model, device=device, dtype=dtype, tensor=tensor)
    return assemble_decoder(blueprint, reader.read, reading=reading)


def assemble_decoder(blueprint: Blueprint, read: Callable[[str], Tensor], *, reading: Reading) -> Decoder:
    """A decoder whose weights come from `read(logical name)`; holds one fp32 tensor beside the model at a time."""
    decoder = Decoder(build_layers(blueprint, reading))

    def weight(empty: nn.Parameter) -> Tensor:
        logical = logical_of(empty)
        part = logical.cut(read(logical.name)).reshape(empty.shape)
        # A copy, so that a reader may hand out its own memory.
        return torch.empty_like(part, device=blueprint.device, dtype=blueprint.dtype).copy_(part)

    materialise(decoder, weight)
    return decoder.requires_grad_(False).eval()
