"""EXAONE 4, with full attention in all layers."""

from __future__ import annotations

from conf.errors import UserError
from train.config.model import ModelConfig
from train.convert.families.decoder import DECODER, POST_NORMS, QK_NORMS, layer_types, read_decoder, write_decoder
from train.convert.families.family import Family, Fields, Json


def _write(model: ModelConfig) -> Json:
    return write_decoder(model) | {
        "head_dim": model.head_dim,
        "sliding_window": None,
        "sliding_window_pattern": None,
        "layer_types": layer_types(model),
    }


def _read(fields: Fields) -> Json:
    fields.need("hidden_act", "silu")
    fields.read |= {"sliding_window", "sliding_window_pattern"}  # said by layer_types
    if "sliding_attention" in fields["layer_types"]:
        raise UserError("config.json: an EXAONE 4 with sliding_window is not supported: its other layers know no positions")
    return read_decoder(fields) | {"norm_placement": "post", "qk_norm": True}


EXAONE4 = Family(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    classifier="Exaone4ForSequenceClassification",
    rules=DECODER + POST_NORMS + QK_NORMS,
    write=_write,
    read=_read,
)
