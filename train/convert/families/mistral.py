"""Mistral."""

from __future__ import annotations

from train.config.model import ModelConfig
from train.convert.families.decoder import DECODER, PRE_NORMS, read_decoder, write_decoder
from train.convert.families.family import Family, Fields, Json


def _write(model: ModelConfig) -> Json:
    return write_decoder(model) | {"head_dim": model.head_dim, "sliding_window": model.window}


def _read(fields: Fields) -> Json:
    fields.need("hidden_act", "silu")
    return read_decoder(fields) | {"window": fields["sliding_window"]}


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    rules=DECODER + PRE_NORMS,
    write=_write,
    read=_read,
)
