"""Rotary frequencies, amplitudes and tables against those that transformers makes from the same settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from tests.parity.custom import LIMIT, LONGROPE, YARN
from tests.parity.hugging_face import rope_parameters
from tests.parity.pairs import CASES, STRETCHED
from train.config.model import ModelConfig, RopeConfig
from train.model.rotary import Rotary, last_positions, rotary_frequencies

HEAD = 32
SIXTEEN = {
    "short_factors": tuple(1 + 0.01 * pair for pair in range(16)),
    "long_factors": tuple(1 + 0.8 * pair for pair in range(16)),
}
ROPES: dict[str, RopeConfig] = {
    "linear": RopeConfig(scaling="linear", factor=3.0),
    "dynamic": RopeConfig(scaling="dynamic", factor=4.0),
    "llama3": RopeConfig(scaling="llama3", base=500_000.0),
    "yarn": RopeConfig(scaling="yarn", factor=4.0, original_max_positions=4096),
    "yarn-not-truncated": RopeConfig(scaling="yarn", factor=32.0, original_max_positions=4096, base=150_000.0, truncate=False),
    "yarn-turns": RopeConfig(scaling="yarn", factor=40.0, original_max_positions=2048, fast_turns=20.0, slow_turns=2.5),
    "yarn-tiny-context": replace(YARN, original_max_positions=4, truncate=False),  # all of the line lies below pair 0
    "yarn-factor-one": RopeConfig(scaling="yarn", factor=1.0, original_max_positions=4096),
    "yarn-own-amplitude": RopeConfig(scaling="yarn", factor=4.0, original_max_positions=4096, attention_factor=1.3),
    "longrope": replace(LONGROPE, **SIXTEEN),
    "longrope-factor-one": replace(LONGROPE, **SIXTEEN, factor=1.0),
    "longrope-own-amplitude": replace(LONGROPE, **SIXTEEN, attention_factor=1.19),
}


def _config(rope: RopeConfig, kind: type = transformers.LlamaConfig) -> transformers.PreTrainedConfig:
    return kind(
        hidden_size=2 * HEAD,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=160,
        original_max_position_embeddings=rope.original_max_positions,
        rope_parameters=rope_parameters(rope),
        pad_token_id=None,
    )


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_amplitude(name: str, fraction: float) -> None:
    rope = replace(ROPES[name], fraction=fraction)
    pairs = rope.rotated_size(HEAD) // 2
    rope = replace(rope, short_factors=rope.short_factors[:pairs], long_factors=rope.long_factors[:pairs])
    make = ROPE_INIT_FUNCTIONS[rope.scaling]
    frequencies = rotary_frequencies(HEAD, rope)
    if rope.scaling == "longrope":
        assert frequencies.shape == (2, pairs)
        lengths = (rope.original_max_positions, rope.original_max_positions + 1)
        for found, seq_len in zip(frequencies, lengths, strict=True):
            expected, amplitude = make(_config(rope), "cpu", seq_len=seq_len)
            assert torch.equal(found, expected) and rope.amplitude == amplitude
        return
    expected, amplitude = make(_config(rope), "cpu")
    assert rope.amplitude == amplitude
    torch.testing.assert_close(frequencies, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize(("turns", "kept"), [(8.0, 1.0), (3.0, (3.5 - 2.0) / 5.0)])
def test_yarn_in_plain_numbers(turns: float, kept: float) -> None:
    """Peng et al. 2023: a pair of 8 turns stays; along the line from pair 1 to pair 6, one of 3.5 keeps its part."""
    base, original, rotated = 10_000.0, 4096, 16
    # The bounds are put at pairs 1 and 6: those turn original / (2 pi) base^(-2 pair / rotated) times.
    times = [original / (2 * torch.pi) * base ** (-2 * pair / rotated) for pair in range(8)]
    rope = RopeConfig(
        scaling="yarn", factor=4.0, original_max_positions=original, truncate=False, fast_turns=times[1], slow_turns=times[6]
    )
    found = rotary_frequencies(rotated, rope).double()
    for pair in range(8):
        plain, part = base ** (-2 * pair / rotated), min(max((6 - pair) / 5, 0), 1)
        assert found[pair].item() == pytest.approx(plain * (part + (1 - part) / 4), rel=1e-6)


def _tables(rope: RopeConfig, positions_T: torch.Tensor, last: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    model: ModelConfig = replace(CASES["llama-gqa"], family="custom", head_size=HEAD, rope=rope)
    cosine_T1R, sine_T1R = Rotary(model).tables(positions_T, torch.float32, last_position=last)[None]
    first, second = sine_T1R.chunk(2, dim=-1)
    assert torch.equal(first, -second)  # ours has the sign that their rotate_half gives the states
    return cosine_T1R, torch.cat((second, second), dim=-1)


@pytest.mark.parametrize("end", [LIMIT - 1, LIMIT, LIMIT + 1, 150])
def test_longrope_is_that_of_phi3(end: int) -> None:
    rope = ROPES["longrope"]
    module = Phi3RotaryEmbedding(_config(rope, transformers.Phi3Config))
    positions_T = torch.arange(end)
    expected = module(torch.zeros(1), positions_T[None])
    for last in (torch.full((end,), end - 1), torch.tensor(end - 1)):  # of every token its own, and one for all
        for found, theirs in zip(_tables(rope, positions_T, last), expected, strict=True):
            torch.testing.assert_close(found.squeeze(1), theirs[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["dynamic", "yarn", "yarn-own-amplitude", "linear"])
def test_tables_are_those_of_their_modules(name: str, kind: str) -> None:
    make, config = {
        "llama": (LlamaRotaryEmbedding, transformers.LlamaConfig),
        "qwen2": (Qwen2RotaryEmbedding, transformers.Qwen2Config),
    }[kind]
    positions_T = torch.arange(160)
    expected = make(_config(ROPES[name], config))(torch.zeros(1), positions_T[None])
    for found, theirs in zip(_tables(ROPES[name], positions_T, None), expected, strict=True):
        torch.testing.assert_close(found.squeeze(1), theirs[0], rtol=0, atol=3e-5)


def test_last_positions_of_documents() -> None:
    positions_T = torch.tensor([0, 1, 2, 0, 0, 1])
    bounds = torch.tensor([0, 3, 4, 6, 6, 6], dtype=torch.int32)
    assert last_positions(positions_T, bounds).tolist() == [2, 2, 2, 0, 1, 1]


def test_only_longrope_asks_for_lengths() -> None:
    def asks(**settings: object) -> bool:
        return Rotary(replace(CASES["llama-gqa"], family="custom", **settings)).asks_for_lengths

    assert not asks(rope=STRETCHED) and not asks(rope=YARN) and not asks(positions="learned")
    assert asks(rope=LONGROPE) and asks(window=8, window_pattern="SL", local_rope=LONGROPE)
