"""The model's settings in the words of Hugging Face: config.json and generation_config.json.

What a family cannot say is refused when a configuration is made, by the tables of `train.config.families`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from conf.errors import UserError
from train.config.model import ModelConfig, RopeConfig

Json: TypeAlias = dict[str, Any]
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Ids that a reader of the model needs to know; None: the tokenizer has no such token."""

    bos: int | None
    eos: int | None


def check_expressible(model: ModelConfig) -> None:
    """Raise UserError when no Hugging Face class is named for this model; a family's fields were checked at its making."""
    if model.family not in WRITERS:
        raise UserError(
            f"model.family={model.family}: no Hugging Face class is named for this model; it can be exported when its fields "
            f"are those of a family, one of {', '.join(WRITERS)}"
        )
    if model.width_ratio != 1.0:
        raise UserError(
            f"model.mup_base_width={model.mup_base_width}: Hugging Face's {model.family} has no multiplier of the "
            "logits, which muP needs; export a run whose width is its base"
        )


def model_config(model: ModelConfig, special: SpecialIds, dtype: Literal["fp32", "bf16"]) -> Json:
    """The content of config.json."""
    check_expressible(model)
    return WRITERS[model.family](model) | {
        "vocab_size": model.vocab_size,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_head,
        # Said even when there is none: the classes have defaults of their own, ids of other tokenizers.
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": None,
        "use_cache": True,
        # transformers 5 reads `dtype`, older releases and other readers `torch_dtype`.
        "dtype": DTYPE_NAMES[dtype],
        "torch_dtype": DTYPE_NAMES[dtype],
    }


def generation_config(special: SpecialIds) -> Json:
    """The content of generation_config.json."""
    ids = {"bos_token_id": special.bos, "eos_token_id": None if special.eos is None else [special.eos]}
    return {name: value for name, value in ids.items() if value is not None}


def _gpt2(model: ModelConfig) -> Json:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": model.max_positions,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.ffn_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_epsilon,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    }


def _decoder(model: ModelConfig, *, architecture: str, model_type: str) -> Json:
    """What Llama and those after it have in common."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "max_position_embeddings": model.max_positions,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.ffn_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "attention_dropout": model.dropout,
        **_rope(model.rope),
    }


def _llama(model: ModelConfig) -> Json:
    return _decoder(model, architecture="LlamaForCausalLM", model_type="llama") | {
        "head_dim": model.head_dim,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "pretraining_tp": 1,
    }


def _mistral(model: ModelConfig) -> Json:
    return _decoder(model, architecture="MistralForCausalLM", model_type="mistral") | {
        "head_dim": model.head_dim,
        "sliding_window": model.window,
    }


_NO_WINDOW: Json = {"use_sliding_window": False, "sliding_window": None}


def _qwen2(model: ModelConfig) -> Json:
    return _decoder(model, architecture="Qwen2ForCausalLM", model_type="qwen2") | _NO_WINDOW


def _qwen3(model: ModelConfig) -> Json:
    return (
        _decoder(model, architecture="Qwen3ForCausalLM", model_type="qwen3")
        | _NO_WINDOW
        | {"head_dim": model.head_dim, "attention_bias": False}
    )


def _gemma(model: ModelConfig, *, architecture: str, model_type: str) -> Json:
    content = _decoder(model, architecture=architecture, model_type=model_type)
    del content["hidden_act"]
    return content | {
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": model.head_dim,
        "attention_bias": False,
        "query_pre_attn_scalar": round(model.score_scale**-2),
        "sliding_window": model.window,
        "layer_types": [
            "full_attention" if model.window_of(number) is None else "sliding_attention" for number in range(model.num_layers)
        ],
        "final_logit_softcapping": model.logit_softcap,
        "attn_logit_softcapping": model.attention_softcap,
    }


def _gemma2(model: ModelConfig) -> Json:
    return _gemma(model, architecture="Gemma2ForCausalLM", model_type="gemma2")


def _gemma3(model: ModelConfig) -> Json:
    content = _gemma(model, architecture="Gemma3ForCausalLM", model_type="gemma3_text")
    local = _rope(model.local_rope or model.rope)
    return content | {
        "rope_parameters": {
            "full_attention": content["rope_parameters"],
            "sliding_attention": local["rope_parameters"],
        },
        # The older words; rope_theta and rope_scaling are of the layers without a window.
        "rope_local_base_freq": local["rope_theta"],
        "sliding_window_pattern": len(model.window_pattern),
    }


def _gpt_neox(model: ModelConfig) -> Json:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "max_position_embeddings": model.max_positions,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.ffn_size,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm_epsilon,
        "attention_bias": True,
        "attention_dropout": model.dropout,
        "hidden_dropout": model.dropout,
        "use_parallel_residual": model.residual == "parallel",
        **_rope(model.rope),
        "rotary_pct": model.rope.fraction,  # the older words for the fraction and the base
        "rotary_emb_base": model.rope.base,
    }


def _stablelm(model: ModelConfig) -> Json:
    content = _decoder(model, architecture="StableLmForCausalLM", model_type="stablelm")
    content["layer_norm_eps"] = content.pop("rms_norm_eps")
    return content | {
        "partial_rotary_factor": model.rope.fraction,
        "use_qkv_bias": model.has_qkv_bias,
        "qk_layernorm": False,
        "use_parallel_residual": model.residual == "parallel_shared",
        "hidden_dropout": model.dropout,
    }


def _exaone4(model: ModelConfig) -> Json:
    return _decoder(model, architecture="Exaone4ForCausalLM", model_type="exaone4") | {
        "head_dim": model.head_dim,
        "sliding_window": None,
        "sliding_window_pattern": None,
        "layer_types": ["full_attention"] * model.num_layers,
    }


WRITERS: dict[str, Callable[[ModelConfig], Json]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt_neox": _gpt_neox,
    "stablelm": _stablelm,
    "exaone4": _exaone4,
}


def _rope(rope: RopeConfig) -> Json:
    """Rotary settings in new and old words, which say the same.

    transformers 5 reads rope_parameters alone; a reader of the older fields that finds no rope_theta takes 10000 without a
    word.
    """
    scaling = _rope_scaling(rope)
    fraction = {} if rope.fraction == 1 else {"partial_rotary_factor": rope.fraction}
    return {
        "rope_parameters": {"rope_type": "default", **(scaling or {}), **fraction, "rope_theta": rope.base},
        "rope_theta": rope.base,
        "rope_scaling": scaling,
    }


def _rope_scaling(rope: RopeConfig) -> Json | None:
    if rope.scaling == "none":
        return None
    if rope.scaling == "linear":
        return {"rope_type": "linear", "factor": rope.factor}
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_frequency_factor,
        "high_freq_factor": rope.high_frequency_factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }
