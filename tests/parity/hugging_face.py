"""Models of Hugging Face of a given shape, each configuration written out by hand: it shares no word with the exporter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from train.config.model import ModelConfig, RopeConfig


def build(model: ModelConfig) -> PreTrainedModel:
    """The family's class with the sizes of `model`; attention is computed by plain products."""
    config, make = FAMILIES[model.family](model)
    if model.labels:
        config.id2label = dict(enumerate(model.labels))
        config.label2id = {label: number for number, label in config.id2label.items()}
        config.pad_token_id = None
        make = CLASSIFIERS[model.family]
    config._attn_implementation = "eager"
    return make(config)


def named_weights(module: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters by the names that they have in published files."""
    parameters = dict(module.named_parameters())
    if module.config.model_type == "gpt_neox" and "lm_head.weight" in parameters:
        parameters["embed_out.weight"] = parameters.pop("lm_head.weight")
    return parameters


def _gpt2(model: ModelConfig) -> tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]:
    config = transformers.GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.max_positions,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_inner=model.ffn_size,
        layer_norm_epsilon=model.norm_epsilon,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=model.tied_head,
        bos_token_id=None,
        eos_token_id=None,
    )
    return config, transformers.GPT2LMHeadModel


def _common(model: ModelConfig) -> dict[str, Any]:
    """Words that all classes but GPT-2's share."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "max_position_embeddings": model.max_positions,
        "tie_word_embeddings": model.tied_head,
        "rope_parameters": rope_parameters(model.rope),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,  # a class's own id of padding would have an embedding without a gradient
    }


def rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    """Rotary settings in the words of transformers."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.base, "partial_rotary_factor": rope.fraction}
    if rope.scaling == "linear":
        parameters |= {"rope_type": "linear", "factor": rope.factor}
    if rope.scaling == "llama3":
        parameters |= {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_frequency_factor,
            "high_freq_factor": rope.high_frequency_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    if rope.scaling == "dynamic":
        parameters |= {"rope_type": "dynamic", "factor": rope.factor}
    if rope.scaling == "yarn":
        parameters |= {
            "rope_type": "yarn",
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_positions,
            "beta_fast": rope.fast_turns,
            "beta_slow": rope.slow_turns,
            "truncate": rope.truncate,
            "attention_factor": rope.attention_factor,
        }
    if rope.scaling == "longrope":
        parameters |= {
            "rope_type": "longrope",
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_positions,
            "short_factor": list(rope.short_factors),
            "long_factor": list(rope.long_factors),
            "attention_factor": rope.attention_factor,
        }
    return parameters


def _grouped(model: ModelConfig) -> dict[str, Any]:
    return _common(model) | {"num_key_value_heads": model.kv_heads, "rms_norm_eps": model.norm_epsilon}


def _llama(model: ModelConfig) -> tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]:
    config = transformers.LlamaConfig(
        **_grouped(model), head_dim=model.head_dim, attention_bias=model.bias, mlp_bias=model.bias
    )
    return config, transformers.LlamaForCausalLM


def _mistral(model: ModelConfig) -> tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]:
    config = transformers.MistralConfig(**_grouped(model), head_dim=model.head_dim, sliding_window=model.window)
    return config, transformers.MistralForCausalLM


def _qwen2(model: ModelConfig) -> tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]:
    return transformers.Qwen2Config(**_grouped(model)), transformers.Qwen2ForCausalLM


def _qwen3(model: ModelConfig) -> tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]:
    return transformers.Qwen3Config(**_grouped(model), head_dim=model.head_dim), transformers.Qwen3ForCausalLM


def _gemma(model: ModelConfig) -> dict[str, Any]:
    return _grouped(model) | {
        "head_dim": model.head_dim,
        "query_pre_attn_scalar": round(model.score_scale**-2),
        "sliding_window": model.window,
        "final_logit_softcapping": model.logit_softcap,
        "attn_logit_softcapping": model.attention_softcap,
    }


def _gemma2(model: ModelConfig) -> tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]:
    return transformers.Gemma2Config(**_gemma(model)), transformers.Gemma2ForCausalLM


def _gemma3(model: ModelConfig) -> tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]:
    ropes = {"full_attention": rope_parameters(model.rope), "sliding_attention": rope_parameters(model.local_rope)}
    config = transformers.Gemma3TextConfig(
        **_gemma(model) | {"rope_parameters": ropes}, sliding_window_pattern=len(model.window_pattern)
    )
    return config, transformers.Gemma3ForCausalLM


def _gemma1(model: ModelConfig) -> tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]:
    return transformers.GemmaConfig(**_grouped(model), head_dim=model.head_dim), transformers.GemmaForCausalLM


def _phi3(model: ModelConfig) -> tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]:
    own = {"sliding_window": model.window, "original_max_position_embeddings": model.rope.original_max_positions}
    return transformers.Phi3Config(**_grouped(model), **own), transformers.Phi3ForCausalLM


def _olmo2(model: ModelConfig) -> tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]:
    return transformers.Olmo2Config(**_grouped(model)), transformers.Olmo2ForCausalLM


def _gpt_neox(model: ModelConfig) -> tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]:
    config = transformers.GPTNeoXConfig(
        **_common(model),
        layer_norm_eps=model.norm_epsilon,
        use_parallel_residual=model.residual == "parallel",
    )
    return config, transformers.GPTNeoXForCausalLM


def _stablelm(model: ModelConfig) -> tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]:
    config = transformers.StableLmConfig(
        **_common(model),
        num_key_value_heads=model.kv_heads,
        layer_norm_eps=model.norm_epsilon,
        use_qkv_bias=bool(model.qkv_bias),
        use_parallel_residual=model.residual == "parallel_shared",
    )
    return config, transformers.StableLmForCausalLM


def _exaone4(model: ModelConfig) -> tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]:
    layers = ["full_attention"] * model.num_layers
    return transformers.Exaone4Config(
        **_grouped(model), sliding_window=None, layer_types=layers
    ), transformers.Exaone4ForCausalLM


FAMILIES: dict[str, Callable[[ModelConfig], tuple[PreTrainedConfig, Callable[..., PreTrainedModel]]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma1,
    "gemma2": _gemma2,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "gemma3": _gemma3,
    "gpt_neox": _gpt_neox,
    "stablelm": _stablelm,
    "exaone4": _exaone4,
}
CLASSIFIERS: dict[str, Callable[..., PreTrainedModel]] = {
    "gpt2": transformers.GPT2ForSequenceClassification,
    "llama": transformers.LlamaForSequenceClassification,
    "mistral": transformers.MistralForSequenceClassification,
    "qwen2": transformers.Qwen2ForSequenceClassification,
    "qwen3": transformers.Qwen3ForSequenceClassification,
    "gemma": transformers.GemmaForSequenceClassification,
    "gemma2": transformers.Gemma2ForSequenceClassification,
    "phi3": transformers.Phi3ForSequenceClassification,
    "olmo2": transformers.Olmo2ForSequenceClassification,
    "gemma3": transformers.Gemma3TextForSequenceClassification,
    "gpt_neox": transformers.GPTNeoXForSequenceClassification,
    "stablelm": transformers.StableLmForSequenceClassification,
    "exaone4": transformers.Exaone4ForSequenceClassification,
}
