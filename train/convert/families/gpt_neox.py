"""GPT-NeoX and Pythia."""

from __future__ import annotations

from train.config.model import ModelConfig
from train.convert.families.family import Family, Fields, Json
from train.convert.families.rope import read_rope, rope_fields
from train.convert.rules import QKV_BY_HEAD, VOCABULARY, pair

RULES = (
    pair("embedding.tokens.weight", "gpt_neox.embed_in.weight", VOCABULARY),
    pair("blocks.{layer}.attention_norm.weight", "gpt_neox.layers.{layer}.input_layernorm.weight"),
    pair("blocks.{layer}.attention_norm.bias", "gpt_neox.layers.{layer}.input_layernorm.bias"),
    pair("blocks.{layer}.attention.qkv.weight", "gpt_neox.layers.{layer}.attention.query_key_value.weight", QKV_BY_HEAD),
    pair("blocks.{layer}.attention.qkv.bias", "gpt_neox.layers.{layer}.attention.query_key_value.bias", QKV_BY_HEAD),
    pair("blocks.{layer}.attention.output.weight", "gpt_neox.layers.{layer}.attention.dense.weight"),
    pair("blocks.{layer}.attention.output.bias", "gpt_neox.layers.{layer}.attention.dense.bias"),
    pair("blocks.{layer}.mlp_norm.weight", "gpt_neox.layers.{layer}.post_attention_layernorm.weight"),
    pair("blocks.{layer}.mlp_norm.bias", "gpt_neox.layers.{layer}.post_attention_layernorm.bias"),
    pair("blocks.{layer}.mlp.up.weight", "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight"),
    pair("blocks.{layer}.mlp.up.bias", "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.bias"),
    pair("blocks.{layer}.mlp.down.weight", "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight"),
    pair("blocks.{layer}.mlp.down.bias", "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.bias"),
    pair("final_norm.weight", "gpt_neox.final_layer_norm.weight"),
    pair("final_norm.bias", "gpt_neox.final_layer_norm.bias"),
    # The published name; transformers 5 calls it lm_head and reads both.
    pair("head.weight", "embed_out.weight", VOCABULARY),
    pair("score.weight", "score.weight"),
)
ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu"}


def _write(model: ModelConfig) -> Json:
    return {
        "max_position_embeddings": model.max_positions,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.ffn_size,
        "hidden_act": "gelu" if model.mlp == "gelu_exact" else "gelu_new",
        "layer_norm_eps": model.norm_epsilon,
        "attention_bias": model.has_qkv_bias,
        "attention_dropout": model.dropout,
        "hidden_dropout": model.dropout,
        "use_parallel_residual": model.residual == "parallel",
        **rope_fields(model.rope),
        "rotary_pct": model.rope.fraction,  # the older words for the fraction and the base
        "rotary_emb_base": model.rope.base,
    }


def _read(fields: Fields) -> Json:
    max_positions, attention_bias = fields["max_position_embeddings"], bool(fields["attention_bias"])
    return {
        "num_layers": fields["num_hidden_layers"],
        "hidden_size": fields["hidden_size"],
        "num_heads": fields["num_attention_heads"],
        "ffn_size": fields["intermediate_size"],
        "max_positions": max_positions,
        "positions": "rotary",
        "rope": read_rope(fields["rope_parameters"], max_positions=max_positions),
        "norm": "layer",
        "norm_epsilon": fields["layer_norm_eps"],
        "residual": "parallel" if fields["use_parallel_residual"] else "sequential",
        "mlp": fields.choice("hidden_act", ACTIVATIONS),
        "bias": True,
        "qkv_bias": attention_bias,
        "attention_output_bias": attention_bias,
        "dropout": fields.dropout("attention_dropout", "hidden_dropout"),
    }


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    classifier="GPTNeoXForSequenceClassification",
    rules=RULES,
    write=_write,
    read=_read,
    prefix="gpt_neox.",
    aliases={"lm_head.weight": "embed_out.weight"},
    buffers=(r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
