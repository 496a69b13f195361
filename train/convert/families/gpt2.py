"""GPT-2."""

from __future__ import annotations

from train.config.model import ModelConfig
from train.convert.families.family import Family, Fields, Json
from train.convert.rules import QKV_CONV1D, QKV_IN_A_ROW, TRANSPOSED, VOCABULARY, pair

RULES = (
    pair("embedding.tokens.weight", "transformer.wte.weight", VOCABULARY),
    pair("embedding.positions.weight", "transformer.wpe.weight"),
    pair("blocks.{layer}.attention_norm.weight", "transformer.h.{layer}.ln_1.weight"),
    pair("blocks.{layer}.attention_norm.bias", "transformer.h.{layer}.ln_1.bias"),
    pair("blocks.{layer}.attention.qkv.weight", "transformer.h.{layer}.attn.c_attn.weight", QKV_CONV1D),
    pair("blocks.{layer}.attention.qkv.bias", "transformer.h.{layer}.attn.c_attn.bias", QKV_IN_A_ROW),
    pair("blocks.{layer}.attention.output.weight", "transformer.h.{layer}.attn.c_proj.weight", TRANSPOSED),
    pair("blocks.{layer}.attention.output.bias", "transformer.h.{layer}.attn.c_proj.bias"),
    pair("blocks.{layer}.mlp_norm.weight", "transformer.h.{layer}.ln_2.weight"),
    pair("blocks.{layer}.mlp_norm.bias", "transformer.h.{layer}.ln_2.bias"),
    pair("blocks.{layer}.mlp.up.weight", "transformer.h.{layer}.mlp.c_fc.weight", TRANSPOSED),
    pair("blocks.{layer}.mlp.up.bias", "transformer.h.{layer}.mlp.c_fc.bias"),
    pair("blocks.{layer}.mlp.down.weight", "transformer.h.{layer}.mlp.c_proj.weight", TRANSPOSED),
    pair("blocks.{layer}.mlp.down.bias", "transformer.h.{layer}.mlp.c_proj.bias"),
    pair("final_norm.weight", "transformer.ln_f.weight"),
    pair("final_norm.bias", "transformer.ln_f.bias"),
    pair("head.weight", "lm_head.weight", VOCABULARY),
    pair("score.weight", "score.weight"),
)
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}


def _write(model: ModelConfig) -> Json:
    return {
        "n_positions": model.max_positions,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.ffn_size,
        "activation_function": "gelu_new" if model.mlp == "gelu" else "gelu",
        "layer_norm_epsilon": model.norm_epsilon,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
        "scale_attn_weights": model.score_scale != 1.0,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    }


def _read(fields: Fields) -> Json:
    fields.need("scale_attn_by_inverse_layer_idx", False)
    fields.need("add_cross_attention", False)
    fields.need("reorder_and_upcast_attn", False, True)  # a matter of rounding
    return {
        "num_layers": fields["n_layer"],
        "hidden_size": fields["n_embd"],
        "num_heads": fields["n_head"],
        "ffn_size": fields["n_inner"] or 4 * fields["n_embd"],
        "max_positions": fields["n_positions"],
        "positions": "learned",
        "norm": "layer",
        "norm_epsilon": fields["layer_norm_epsilon"],
        "mlp": fields.choice("activation_function", ACTIVATIONS),
        "bias": True,
        "attention_scale": None if fields["scale_attn_weights"] else 1.0,
        "dropout": fields.dropout("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    }


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    rules=RULES,
    write=_write,
    read=_read,
    prefix="transformer.",
    buffers=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
)
