"""StableLM."""

from __future__ import annotations

from train.config.model import ModelConfig
from train.convert.families.decoder import DECODER, PRE_NORMS, read_decoder, write_decoder
from train.convert.families.family import Family, Fields, Json
from train.convert.rules import pair

RULES = (
    *DECODER,
    *PRE_NORMS,
    pair("blocks.{layer}.attention_norm.bias", "model.layers.{layer}.input_layernorm.bias"),
    pair("blocks.{layer}.mlp_norm.bias", "model.layers.{layer}.post_attention_layernorm.bias"),
    pair("final_norm.bias", "model.norm.bias"),
)


def _write(model: ModelConfig) -> Json:
    content = write_decoder(model)
    content["layer_norm_eps"] = content.pop("rms_norm_eps")
    return content | {
        "partial_rotary_factor": model.rope.fraction,
        "use_qkv_bias": model.has_qkv_bias,
        "qk_layernorm": False,
        "use_parallel_residual": model.residual == "parallel_shared",
        "hidden_dropout": model.dropout,
    }


def _read(fields: Fields) -> Json:
    fields.need("hidden_act", "silu")
    fields.need("qk_layernorm", False)
    return read_decoder(fields, epsilon="layer_norm_eps") | {
        "norm": "layer",
        "residual": "parallel_shared" if fields["use_parallel_residual"] else "sequential",
        "qkv_bias": bool(fields["use_qkv_bias"]),
        "dropout": fields.dropout("attention_dropout", "hidden_dropout"),
    }


STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    classifier="StableLmForSequenceClassification",
    rules=RULES,
    write=_write,
    read=_read,
)
