"""Qwen 2 (with Qwen 1.5 and 2.5) and Qwen 3, the dense models."""

from __future__ import annotations

from train.config.model import ModelConfig
from train.convert.families.decoder import (
    DECODER,
    PRE_NORMS,
    QK_NORMS,
    attention_biases,
    layer_types,
    read_decoder,
    read_windows,
    write_decoder,
)
from train.convert.families.family import Family, Fields, Json


def _windows(model: ModelConfig) -> Json:
    types = layer_types(model)
    first_sliding = types.index("sliding_attention") if "sliding_attention" in types else model.num_layers
    return {
        "use_sliding_window": model.window is not None,
        "sliding_window": model.window,
        # The older word, which can say one thing: full attention in the first layers, a window in all after them.
        "max_window_layers": first_sliding,
        "layer_types": types,
    }


def _write_qwen2(model: ModelConfig) -> Json:
    return write_decoder(model) | _windows(model)


def _read_qwen2(fields: Fields) -> Json:
    fields.need("hidden_act", "silu")
    fields.read |= {"use_sliding_window", "max_window_layers"}  # said by layer_types
    return read_decoder(fields) | read_windows(fields) | {"qkv_bias": True}


def _write_qwen3(model: ModelConfig) -> Json:
    return _write_qwen2(model) | {"head_dim": model.head_dim, "attention_bias": model.has_qkv_bias}


def _read_qwen3(fields: Fields) -> Json:
    return _read_qwen2(fields) | attention_biases(fields) | {"qk_norm": True}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    rules=DECODER + PRE_NORMS,
    write=_write_qwen2,
    read=_read_qwen2,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    rules=DECODER + PRE_NORMS + QK_NORMS,
    write=_write_qwen3,
    read=_read_qwen3,
)
