"""Phi-3, Phi-3.5 and Phi-4, the dense models of text."""

from __future__ import annotations

from train.config.model import ModelConfig
from train.convert.families.decoder import ENDS, OUTPUTS, PRE_NORMS, read_decoder, write_decoder
from train.convert.families.family import Family, Fields, Json
from train.convert.rules import GATE_AND_UP_IN_A_ROW, QKV_IN_A_ROW, pair

RULES = (
    *ENDS,
    *PRE_NORMS,
    *OUTPUTS,
    pair("blocks.{layer}.attention.qkv.weight", "model.layers.{layer}.self_attn.qkv_proj.weight", QKV_IN_A_ROW),
    pair("blocks.{layer}.mlp.gate_up.weight", "model.layers.{layer}.mlp.gate_up_proj.weight", GATE_AND_UP_IN_A_ROW),
)


def _write(model: ModelConfig) -> Json:
    content = write_decoder(model)
    rope, original = model.rope, model.max_positions
    if rope.scaling == "longrope":
        original = rope.original_max_positions
        # transformers 4 takes these three words and no other.
        factors = {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        content["rope_scaling"] = {"type": "longrope", **factors}
    return content | {
        "original_max_position_embeddings": original,
        "partial_rotary_factor": rope.fraction,
        "sliding_window": model.window,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
    }


def _read(fields: Fields) -> Json:
    fields.need("hidden_act", "silu")
    fields.read.add("original_max_position_embeddings")  # said by the rotary settings
    dropout = fields.dropout("attention_dropout", "resid_pdrop", "embd_pdrop")
    return read_decoder(fields) | {"window": fields["sliding_window"], "dropout": dropout}


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    classifier="Phi3ForSequenceClassification",
    rules=RULES,
    write=_write,
    read=_read,
)
