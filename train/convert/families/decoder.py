"""What Llama and those after it have in common: names of tensors, and words of config.json."""

from __future__ import annotations

from conf.errors import UserError
from train.config.model import ModelConfig
from train.convert.families.family import Fields, Json
from train.convert.families.rope import read_rope, rope_fields
from train.convert.rules import GATE_AND_UP, QKV_APART, VOCABULARY, Rule, fan, pair

_QKV, _GATE_UP = ("q", "k", "v"), ("gate", "up")
_LETTERS = {"sliding_attention": "S", "full_attention": "L"}
_BLOCK, _LAYER = "blocks.{layer}", "model.layers.{layer}"

ENDS: tuple[Rule, ...] = (
    pair("embedding.tokens.weight", "model.embed_tokens.weight", VOCABULARY),
    pair("final_norm.weight", "model.norm.weight"),
    pair("head.weight", "lm_head.weight", VOCABULARY),
    pair("score.weight", "score.weight"),
)
OUTPUTS: tuple[Rule, ...] = (
    pair(f"{_BLOCK}.attention.output.weight", f"{_LAYER}.self_attn.o_proj.weight"),
    pair(f"{_BLOCK}.attention.output.bias", f"{_LAYER}.self_attn.o_proj.bias"),
    pair(f"{_BLOCK}.mlp.down.weight", f"{_LAYER}.mlp.down_proj.weight"),
    pair(f"{_BLOCK}.mlp.down.bias", f"{_LAYER}.mlp.down_proj.bias"),
)
# All but the norms of the blocks.
DECODER: tuple[Rule, ...] = (
    *ENDS,
    fan(f"{_BLOCK}.attention.qkv.weight", f"{_LAYER}.self_attn.*_proj.weight", _QKV, QKV_APART),
    fan(f"{_BLOCK}.attention.qkv.bias", f"{_LAYER}.self_attn.*_proj.bias", _QKV, QKV_APART),
    fan(f"{_BLOCK}.mlp.gate_up.weight", f"{_LAYER}.mlp.*_proj.weight", _GATE_UP, GATE_AND_UP),
    fan(f"{_BLOCK}.mlp.gate_up.bias", f"{_LAYER}.mlp.*_proj.bias", _GATE_UP, GATE_AND_UP),
    *OUTPUTS,
)
PRE_NORMS: tuple[Rule, ...] = (
    pair(f"{_BLOCK}.attention_norm.weight", f"{_LAYER}.input_layernorm.weight"),
    pair(f"{_BLOCK}.mlp_norm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
)
POST_NORMS: tuple[Rule, ...] = (
    pair(f"{_BLOCK}.attention_post_norm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
    pair(f"{_BLOCK}.mlp_post_norm.weight", f"{_LAYER}.post_feedforward_layernorm.weight"),
)
QK_NORMS: tuple[Rule, ...] = (
    pair(f"{_BLOCK}.attention.query_norm.weight", f"{_LAYER}.self_attn.q_norm.weight"),
    pair(f"{_BLOCK}.attention.key_norm.weight", f"{_LAYER}.self_attn.k_norm.weight"),
)


def write_decoder(model: ModelConfig) -> Json:
    """The words that all of them have."""
    return {
        "max_position_embeddings": model.max_positions,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.ffn_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "attention_dropout": model.dropout,
        **rope_fields(model.rope),
    }


def read_decoder(fields: Fields, *, epsilon: str = "rms_norm_eps", rope: str | None = None) -> Json:
    """Settings that all of them have, of a decoder of RMSNorm and SwiGLU without biases.

    `epsilon` is the field of the norms' epsilon, `rope` the kind of layers whose rotary settings are the model's, in
    families that have several.
    """
    max_positions, num_heads = fields["max_position_embeddings"], fields["num_attention_heads"]
    parameters = fields["rope_parameters"]
    return {
        "num_layers": fields["num_hidden_layers"],
        "hidden_size": fields["hidden_size"],
        "num_heads": num_heads,
        "num_kv_heads": fields["num_key_value_heads"] or num_heads,
        "head_size": fields.get("head_dim"),
        "ffn_size": fields["intermediate_size"],
        "max_positions": max_positions,
        "positions": "rotary",
        "rope": read_rope(parameters if rope is None else parameters[rope], max_positions=max_positions),
        "norm": "rms",
        "norm_epsilon": fields[epsilon],
        "mlp": "swiglu",
        "bias": False,
        "dropout": fields.dropout("attention_dropout"),
    }


def attention_biases(fields: Fields) -> Json:
    """Settings of families with one switch for all biases of attention."""
    present = bool(fields["attention_bias"])
    return {"qkv_bias": present, "attention_output_bias": present}


def layer_types(model: ModelConfig) -> list[str]:
    """Which kind of attention each layer has, in the words of transformers."""
    names = {letter: name for name, letter in _LETTERS.items()}
    return [names["L" if model.window_of(number) is None else "S"] for number in range(model.num_layers)]


def read_windows(fields: Fields) -> Json:
    """The window, and the shortest pattern of the layers that have it.

    Raises UserError for layers of another kind of attention.
    """
    types, window = fields["layer_types"], fields["sliding_window"]
    if unknown := sorted(set(types) - _LETTERS.keys()):
        raise UserError(f"config.json: layer_types hold {', '.join(unknown)}, which is not supported")
    letters = [_LETTERS[name] for name in types]
    if "S" not in letters or window is None:
        return {"window": None, "window_pattern": "S"}
    lengths = range(1, len(letters) + 1)
    period = next(n for n in lengths if all(letter == letters[place % n] for place, letter in enumerate(letters)))
    return {"window": window, "window_pattern": "".join(letters[:period])}
