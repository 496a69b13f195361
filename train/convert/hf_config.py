"""The model's settings in the words of Hugging Face: config.json and generation_config.json; and whether they can be said."""

from __future__ import annotations

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
    """Raise UserError, with every reason, when the family's Hugging Face class cannot compute this model."""
    expected = {
        "gpt2": {"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True},
        "llama": {"positions": "rotary", "norm": "rms", "mlp": "swiglu"},
    }[model.family]
    problems = [
        f"model.{name}={getattr(model, name)}: {model.family} has {value}"
        for name, value in expected.items()
        if getattr(model, name) != value
    ]
    for name in ("window", "attention_scale", "attention_softcap"):
        if getattr(model, name) is not None:
            problems.append(f"model.{name}={getattr(model, name)}: {model.family} has none")
    if model.width_ratio != 1.0 and model.family in ("gpt2", "llama"):
        problems.append(f"model.mup_base_width={model.mup_base_width}: {model.family} has no multiplier of the logits")
    if model.hidden_size % model.num_heads:
        problems.append(f"model.num_heads={model.num_heads}: must divide model.hidden_size={model.hidden_size}")
    if model.family == "gpt2":
        if model.kv_heads != model.num_heads:
            problems.append(f"model.num_kv_heads={model.kv_heads}: gpt2 has as many as num_heads={model.num_heads}")
        if model.head_dim * model.num_heads != model.hidden_size:
            problems.append(f"model.head_size={model.head_dim}: gpt2 has hidden_size / num_heads")
    if problems:
        raise UserError(
            f"Hugging Face's {model.family} cannot hold this model; "
            "its fields must be those of the family:\n" + "\n".join(f"  - {text}" for text in problems)
        )


def model_config(model: ModelConfig, special: SpecialIds, dtype: Literal["fp32", "bf16"]) -> Json:
    """The content of config.json."""
    check_expressible(model)
    family = _gpt2(model) if model.family == "gpt2" else _llama(model)
    return family | {
        "vocab_size": model.vocab_size,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_head,
        # Said even when there is none: both classes have defaults of their own, ids of other tokenizers.
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
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


def _llama(model: ModelConfig) -> Json:
    scaling = _rope_scaling(model.rope)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": model.max_positions,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "attention_dropout": model.dropout,
        "pretraining_tp": 1,
        # transformers 5 reads rope_parameters alone; a reader of the older fields that finds no rope_theta takes 10000
        # without a word. Both say the same.
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": model.rope.base},
        "rope_theta": model.rope.base,
        "rope_scaling": scaling,
    }


def _rope_scaling(rope: RopeConfig) -> Json | None:
    if rope.scaling == "none":
        return None
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_frequency_factor,
        "high_freq_factor": rope.high_frequency_factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }
