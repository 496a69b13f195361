"""Gemma 1, 2 and 3, the models of text."""

from __future__ import annotations

from math import sqrt

from conf.errors import UserError
from train.config.model import ModelConfig
from train.convert.families.decoder import (
    DECODER,
    POST_NORMS,
    PRE_NORMS,
    QK_NORMS,
    attention_biases,
    layer_types,
    read_decoder,
    read_windows,
    write_decoder,
)
from train.convert.families.family import Family, Fields, Json
from train.convert.families.rope import read_rope, rope_fields
from train.convert.rules import pair

FOUR_NORMS = (
    *DECODER,
    *POST_NORMS,
    pair("blocks.{layer}.attention_norm.weight", "model.layers.{layer}.input_layernorm.weight"),
    pair("blocks.{layer}.mlp_norm.weight", "model.layers.{layer}.pre_feedforward_layernorm.weight"),
)


def _write_gemma(model: ModelConfig) -> Json:
    own = {"head_dim": model.head_dim, "attention_bias": model.has_qkv_bias, "hidden_act": "gelu_pytorch_tanh"}
    return write_decoder(model) | own


def _read_gemma(fields: Fields, *, activation: str = "hidden_act", rope: str | None = None) -> Json:
    fields.need(activation, "gelu_pytorch_tanh")
    fields.need("use_bidirectional_attention", None, False)
    settings = read_decoder(fields, rope=rope) | attention_biases(fields)
    return settings | {"mlp": "geglu", "norm_one_plus": True, "embedding_scale": sqrt(settings["hidden_size"])}


def _write_gemma2(model: ModelConfig) -> Json:
    content = _write_gemma(model)
    del content["hidden_act"]
    return content | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(model.score_scale**-2),
        "sliding_window": model.window or model.max_positions,
        "layer_types": layer_types(model),
        "final_logit_softcapping": model.logit_softcap,
        "attn_logit_softcapping": model.attention_softcap,
    }


def _read_gemma2(fields: Fields, *, rope: str | None = None) -> Json:
    return (
        _read_gemma(fields, activation="hidden_activation", rope=rope)
        | read_windows(fields)
        | {
            "norm_placement": "both",
            "attention_scale": fields["query_pre_attn_scalar"] ** -0.5,
            "attention_softcap": fields["attn_logit_softcapping"],
            "logit_softcap": fields["final_logit_softcapping"],
        }
    )


def _write_gemma3(model: ModelConfig) -> Json:
    content = _write_gemma2(model)
    local = rope_fields(model.local_rope or model.rope)
    return content | {
        "rope_parameters": {
            "full_attention": content["rope_parameters"],
            "sliding_attention": local["rope_parameters"],
        },
        # The older words; rope_theta and rope_scaling are of the layers without a window.
        "rope_local_base_freq": local["rope_theta"],
        "sliding_window_pattern": len(model.window_pattern),
    }


def _read_gemma3(fields: Fields) -> Json:
    settings = _read_gemma2(fields, rope="full_attention") | {"attention_softcap": None}
    if fields["attn_logit_softcapping"] is not None:
        fields.notes.append("attn_logit_softcapping: Gemma 3 bounds no scores, and transformers leaves them alone too")
    if settings["window"] is None:
        raise UserError("config.json: a Gemma 3 without sliding_attention among its layer_types is not supported")
    if "L" not in settings["window_pattern"]:  # fewer layers than the pattern has letters
        settings["window_pattern"] = "S" * settings["num_layers"] + "L"
    local = read_rope(fields["rope_parameters"]["sliding_attention"], max_positions=settings["max_positions"])
    return settings | {"qk_norm": True, "local_rope": local}


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    classifier="GemmaForSequenceClassification",
    rules=DECODER + PRE_NORMS,
    write=_write_gemma,
    read=_read_gemma,
)
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    rules=FOUR_NORMS,
    write=_write_gemma2,
    read=_read_gemma2,
)
GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    rules=FOUR_NORMS + QK_NORMS,
    write=_write_gemma3,
    read=_read_gemma3,
)
