"""Rotary positions: the frequencies of every scaling, their tables, and the rotation of queries and keys.

Shapes: T tokens, N heads, D head size, R rotated dimensions of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from train.config.model import ModelConfig, RopeConfig
from train.model.attention.layout import document_of_tokens


def rotary_frequencies(head_size: int, rope: RopeConfig) -> Tensor:
    """Angular frequency of each rotated pair of a head: fp32 [R/2]; longrope has two sets of them, [2, R/2].

    Su et al. 2021; linear divides all frequencies by `factor` (Chen et al. 2023); dynamic leaves them alone up to
    max_positions; yarn (Peng et al. 2023), longrope (Ding et al. 2024) and the llama3 stretch (Meta's release of Llama 3.1)
    as transformers computes them. The sets of longrope: for documents of up to original_max_positions, for longer ones.
    """
    rotated = rope.rotated_size(head_size)
    exponent = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    if rope.scaling == "longrope":
        return 1.0 / (torch.tensor([rope.short_factors, rope.long_factors]) * rope.base**exponent)
    frequency = 1.0 / (rope.base**exponent)
    if rope.scaling in ("none", "dynamic"):
        return frequency
    if rope.scaling == "linear":
        return frequency / rope.factor
    kept = _kept_by_yarn(rotated, rope) if rope.scaling == "yarn" else _kept_by_llama3(frequency, rope)
    return (1 - kept) * frequency / rope.factor + kept * frequency


def _kept_by_llama3(frequency: Tensor, rope: RopeConfig) -> Tensor:
    """How much of each frequency stays: none of wavelengths beyond original / low_frequency_factor, all of those below
    original / high_frequency_factor, between them blended."""
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    blend = (turns - rope.low_frequency_factor) / (rope.high_frequency_factor - rope.low_frequency_factor)
    return blend.clamp(0.0, 1.0)


def _kept_by_yarn(rotated: int, rope: RopeConfig) -> Tensor:
    """How much of each frequency stays: all up to the pair that turns fast_turns times within the original context, none
    from the one on that turns slow_turns times, between them along a straight line."""

    def dimension_of(turns: float) -> float:
        return rotated * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    first, last = dimension_of(rope.fast_turns), dimension_of(rope.slow_turns)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    length = last - first or 0.001  # a jump, where both are one pair
    return 1 - ((torch.arange(rotated // 2).float() - first) / length).clamp(0.0, 1.0)


def rotary_tables(
    positions_T: Tensor, frequency: Tensor, dtype: torch.dtype, *, amplitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, times `amplitude`: each [T, 1, R], both halves of R alike but for the sine's sign.

    `frequency`: [R/2], or of every token its own [T, R/2]. The sine is negative in the first half, as `rotate` wants it.
    """
    angle_TD = (positions_T.float().unsqueeze(1) * frequency).unsqueeze(1)
    cosine, sine = angle_TD.cos().repeat(1, 1, 2), angle_TD.sin()
    sine = torch.cat((-sine, sine), dim=-1)
    if amplitude != 1:
        cosine, sine = cosine * amplitude, sine * amplitude
    return cosine.to(dtype), sine.to(dtype)


def last_positions(positions_T: Tensor, document_bounds: Tensor) -> Tensor:
    """The last position of every token's document: int64 [T]; nothing waits for the device."""
    return positions_T[document_bounds[document_of_tokens(document_bounds, positions_T.shape[0])] - 1]


class Rotary:
    """The rotary tables of a model's layers, made once for all layers with the same settings."""

    def __init__(self, model: ModelConfig) -> None:
        windows = dict.fromkeys(model.window_of(number) for number in range(model.num_layers))
        self.ropes = {window: model.rope_of(window) for window in windows}
        self.frequencies = {rope: rotary_frequencies(model.head_dim, rope) for rope in self.ropes.values() if rope is not None}
        self.asks_for_lengths = any(rope.scaling == "longrope" for rope in self.frequencies)
        """Whether a document's length decides how it is rotated."""

    def tables(
        self, positions_T: Tensor, dtype: torch.dtype, *, last_position: Tensor | None
    ) -> dict[int | None, tuple[Tensor, Tensor] | None]:
        """Cosine and sine of every position by the layer's window; None where nothing is rotated.

        `last_position`: that of every token's document [T], or one for all [], by which longrope chooses its frequencies;
        None will do where `asks_for_lengths` is false.
        """
        made = {}
        for rope, frequency in self.frequencies.items():
            self.frequencies[rope] = frequency = frequency.to(positions_T.device)  # moved once
            if rope.scaling == "longrope":
                assert last_position is not None, "longrope needs the lengths of documents"
                is_long = (last_position >= rope.original_max_positions).unsqueeze(-1)
                frequency = torch.where(is_long, frequency[1], frequency[0])
            made[rope] = rotary_tables(positions_T, frequency, dtype, amplitude=rope.amplitude)
        return {window: made.get(rope) for window, rope in self.ropes.items()}


def rotate(states_TND: Tensor, cosine_T1R: Tensor, sine_T1R: Tensor) -> Tensor:
    """Turn each pair (i, i + R/2) of a head by its position's angle; dimensions from R on stay as they are.

    Half rotation, as Hugging Face's Llama.
    """
    rotated = cosine_T1R.shape[-1]
    turned = states_TND[..., :rotated]
    partners = turned.roll(rotated // 2, dims=-1)
    turned = partners.mul_(sine_T1R).add_(turned * cosine_T1R)  # in place: on a CPU fresh memory costs as much as the sums
    return turned if rotated == states_TND.shape[-1] else torch.cat((turned, states_TND[..., rotated:]), dim=-1)
