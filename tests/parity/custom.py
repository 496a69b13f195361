"""Models that no family of ours holds, beside classes of Hugging Face that compute the same; weights by a family's table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import transformers
from transformers import PreTrainedModel

from tests.parity import hugging_face
from tests.parity.pairs import CASES, Pair, randomise
from train.config.model import ModelConfig, RopeConfig
from train.convert.keymap import KeyMap, rules_of

LIMIT = 64
"""What the stretched models were trained at; their contexts go on to 160."""
_PAIRS = 4  # rotated ones of a head of 8
LONGROPE = RopeConfig(
    base=500.0,
    scaling="longrope",
    factor=2.5,
    original_max_positions=LIMIT,
    short_factors=tuple(1 + 0.05 * pair for pair in range(_PAIRS)),
    long_factors=tuple(1.5 + 0.7 * pair for pair in range(_PAIRS)),
)
YARN = RopeConfig(base=500.0, scaling="yarn", factor=2.5, original_max_positions=LIMIT, fast_turns=8.0)

_LLAMA = replace(CASES["llama-gqa"], family="custom")
_OLMO2 = replace(_LLAMA, norm_placement="post", qk_norm=True, qk_norm_across_heads=True, num_heads=6, num_kv_heads=2)


def _words(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_head,
        "rope_parameters": hugging_face.rope_parameters(model.rope),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }


def _llama(model: ModelConfig, **words: Any) -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_words(model), **words))


def _qwen2(model: ModelConfig) -> PreTrainedModel:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_words(model)))


def _olmo2(model: ModelConfig) -> PreTrainedModel:
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**_words(model)))


# Name -> our model, the family whose names its weights have, and how Hugging Face makes it.
CUSTOM: dict[str, tuple[ModelConfig, str, Callable[[ModelConfig], PreTrainedModel]]] = {
    "longrope": (replace(_LLAMA, rope=LONGROPE), "llama", _llama),
    "yarn": (replace(_LLAMA, rope=YARN), "llama", _llama),
    "yarn-qwen2": (
        replace(_LLAMA, qkv_bias=True, num_heads=6, num_kv_heads=2, rope=replace(YARN, truncate=False, attention_factor=0.9)),
        "qwen2",
        _qwen2,
    ),
    "dynamic": (replace(_LLAMA, rope=RopeConfig(base=500.0, scaling="dynamic", factor=4.0)), "llama", _llama),
    "olmo2": (_OLMO2, "exaone4", _olmo2),
    "attention-biases": (
        replace(_LLAMA, qkv_bias=True, attention_output_bias=True),
        "llama",
        partial(_llama, attention_bias=True),
    ),
    "mlp-biases": (
        replace(_LLAMA, bias=True, qkv_bias=False, attention_output_bias=False),
        "llama",
        partial(_llama, mlp_bias=True),
    ),
    "geglu-exact": (replace(_LLAMA, mlp="geglu_exact"), "llama", partial(_llama, hidden_act="gelu")),
}


def make_custom_pair(name: str, **changes: Any) -> Pair:
    """Both models of a case, with the same random weights; `changes` are to our configuration."""
    settings, table, build = CUSTOM[name]
    settings = replace(settings, **changes)
    theirs = randomise(build(settings), settings)
    keymap = KeyMap(settings, rules_of(table))
    keymap.check_foreign({name: tuple(parameter.shape) for name, parameter in hugging_face.named_weights(theirs).items()})
    return Pair(model=settings, theirs=theirs, keymap=keymap)
