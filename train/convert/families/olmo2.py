"""OLMo 2."""

from __future__ import annotations

from train.config.model import ModelConfig
from train.convert.families.decoder import DECODER, POST_NORMS, QK_NORMS, attention_biases, read_decoder, write_decoder
from train.convert.families.family import Family, Fields, Json


def _write(model: ModelConfig) -> Json:
    return write_decoder(model) | {"attention_bias": model.has_qkv_bias}


def _read(fields: Fields) -> Json:
    fields.need("hidden_act", "silu")
    own = {"norm_placement": "post", "qk_norm": True, "qk_norm_across_heads": True}
    return read_decoder(fields) | attention_biases(fields) | own


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    classifier="Olmo2ForSequenceClassification",
    rules=DECODER + POST_NORMS + QK_NORMS,
    write=_write,
    read=_read,
)
