"""Llama 1 to 3, and the many with its architecture, such as SmolLM."""

from __future__ import annotations

from train.config.model import ModelConfig
from train.convert.families.decoder import DECODER, PRE_NORMS, attention_biases, read_decoder, write_decoder
from train.convert.families.family import Family, Fields, Json


def _write(model: ModelConfig) -> Json:
    return write_decoder(model) | {
        "head_dim": model.head_dim,
        "attention_bias": model.has_qkv_bias,
        "mlp_bias": model.bias,
        "pretraining_tp": 1,
    }


def _read(fields: Fields) -> Json:
    fields.need("hidden_act", "silu")
    fields.read.add("pretraining_tp")  # how its products were cut in training
    return read_decoder(fields) | attention_biases(fields) | {"bias": bool(fields["mlp_bias"])}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    rules=DECODER + PRE_NORMS,
    write=_write,
    read=_read,
    buffers=(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
