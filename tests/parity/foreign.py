"""Tiny random models of Hugging Face with all options of their families on, saved as their library saves them.

Every configuration is written out by hand, in the words of transformers: nothing here knows of our settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenizer import train_tokenizer

VOCAB_SIZE = 290  # not a multiple of 64; a little more than the tokenizer has
MAX_POSITIONS = 160
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,  # a class's own id of padding would have an embedding without a gradient
}
_GQA = _SIZES | {"num_key_value_heads": 2, "rms_norm_eps": 2e-5}
_GEMMA = _GQA | {"head_dim": 12, "attention_bias": True}
_GEMMA2 = _GEMMA | {
    "num_hidden_layers": 4,
    "sliding_window": 23,
    "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 3.0,  # low, so that scores reach it
    "final_logit_softcapping": 2.0,
}


def _rope(kind: str, **words: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 700.0, **words}}


_LLAMA3 = _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=40, beta_fast=8.0, beta_slow=0.5)
_LONG = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.5, 4.0]}
_LONG4 = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}

# Name -> class of the configuration, its words, class of the model.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2Config", {"n_inner": 100}, "GPT2LMHeadModel"),
    "gpt2-untied-exact-unscaled": (
        "GPT2Config",
        {"tie_word_embeddings": False, "activation_function": "gelu", "scale_attn_weights": False},
        "GPT2LMHeadModel",
    ),
    "gpt-neox": ("GPTNeoXConfig", _SIZES | _rope("default", partial_rotary_factor=0.5), "GPTNeoXForCausalLM"),
    "gpt-neox-sequential-tied": (
        "GPTNeoXConfig",
        _SIZES
        | _rope("linear", factor=3.0, partial_rotary_factor=1.0)
        | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
        "GPTNeoXForCausalLM",
    ),
    "llama": ("LlamaConfig", _GQA | _rope("default"), "LlamaForCausalLM"),
    "llama-biases": ("LlamaConfig", _GQA | {"attention_bias": True, "mlp_bias": True}, "LlamaForCausalLM"),
    "llama-attention-bias": ("LlamaConfig", _GQA | {"attention_bias": True, "num_key_value_heads": 6}, "LlamaForCausalLM"),
    "llama-mlp-bias-head-dim": ("LlamaConfig", _GQA | {"mlp_bias": True, "head_dim": 10}, "LlamaForCausalLM"),
    "llama-tied-llama3": ("LlamaConfig", _GQA | _LLAMA3 | {"tie_word_embeddings": True}, "LlamaForCausalLM"),
    "llama-linear": ("LlamaConfig", _GQA | _rope("linear", factor=2.5), "LlamaForCausalLM"),
    "llama-dynamic": ("LlamaConfig", _GQA | _rope("dynamic", factor=2.5), "LlamaForCausalLM"),
    "llama-yarn": ("LlamaConfig", _GQA | _YARN, "LlamaForCausalLM"),
    "llama-longrope": (
        "LlamaConfig",
        _GQA | _rope("longrope", factor=2.0, original_max_position_embeddings=64, **_LONG4),
        "LlamaForCausalLM",
    ),
    "mistral": ("MistralConfig", _GQA | {"sliding_window": 37, "head_dim": 12}, "MistralForCausalLM"),
    "mistral-no-window": ("MistralConfig", _GQA | {"sliding_window": None}, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", _GQA | {"tie_word_embeddings": True}, "Qwen2ForCausalLM"),
    "qwen2-window-yarn": (
        "Qwen2Config",
        _GQA | _YARN | {"use_sliding_window": True, "sliding_window": 37, "max_window_layers": 1},
        "Qwen2ForCausalLM",
    ),
    "qwen3": ("Qwen3Config", _GQA | {"head_dim": 20, "tie_word_embeddings": True}, "Qwen3ForCausalLM"),
    "qwen3-window-biases": (
        "Qwen3Config",
        _GQA
        | {"head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 23, "max_window_layers": 2},
        "Qwen3ForCausalLM",
    ),
    "gemma": ("GemmaConfig", _GEMMA, "GemmaForCausalLM"),
    "gemma-untied": ("GemmaConfig", _GEMMA | {"tie_word_embeddings": False, "attention_bias": False}, "GemmaForCausalLM"),
    "gemma2": ("Gemma2Config", _GEMMA2, "Gemma2ForCausalLM"),
    "gemma2-no-caps-untied": (
        "Gemma2Config",
        _GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
        "Gemma2ForCausalLM",
    ),
    "gemma3": (
        "Gemma3TextConfig",
        _GEMMA2
        | {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        "Gemma3ForCausalLM",
    ),
    "gemma3-few-layers": ("Gemma3TextConfig", _GEMMA2 | {"num_hidden_layers": 2}, "Gemma3ForCausalLM"),
    "phi3": ("Phi3Config", _GQA | {"sliding_window": 37, "original_max_position_embeddings": 160}, "Phi3ForCausalLM"),
    "phi3-longrope-partial": (
        "Phi3Config",
        _GQA
        | {"original_max_position_embeddings": 64, "tie_word_embeddings": True}
        | _rope("longrope", partial_rotary_factor=0.75, original_max_position_embeddings=64, **_LONG),
        "Phi3ForCausalLM",
    ),
    "olmo2": ("Olmo2Config", _GQA, "Olmo2ForCausalLM"),
    "olmo2-biases-tied": (
        "Olmo2Config",
        _GQA | {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 6},
        "Olmo2ForCausalLM",
    ),
    "stablelm": (
        "StableLmConfig",
        _SIZES | {"num_key_value_heads": 2, "use_qkv_bias": True} | _rope("default", partial_rotary_factor=0.25),
        "StableLmForCausalLM",
    ),
    "stablelm-parallel-tied": (
        "StableLmConfig",
        _SIZES
        | {"num_key_value_heads": 6, "use_parallel_residual": True, "tie_word_embeddings": True}
        | _rope("default", partial_rotary_factor=0.5),
        "StableLmForCausalLM",
    ),
    "exaone4": (
        "Exaone4Config",
        _GQA | {"sliding_window": None, "layer_types": ["full_attention"] * 3},
        "Exaone4ForCausalLM",
    ),
}


def build(case: str, *, seed: int = 0) -> PreTrainedModel:
    """The model of a case in evaluation mode, all its weights random, norms and biases too: zeros and ones hide a swap."""
    config_class, words, model_class = CASES[case]
    if config_class == "GPT2Config":
        sizes = {"vocab_size": VOCAB_SIZE, "n_positions": MAX_POSITIONS, "n_embd": 48, "n_layer": 3, "n_head": 6}
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        words = sizes | rates | {"bos_token_id": 0, "eos_token_id": 0} | words
    config = getattr(transformers, config_class)(**words)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(seed)
    one_plus = config_class.startswith("Gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
            parameter.normal_(1.0 if is_norm and not one_plus else 0.0, 0.1, generator=generator)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Save as transformers saves, with a byte-level tokenizer beside it; returns the folder."""
    model.to(dtype).save_pretrained(folder)
    words = ["def main(argv): return the text of nothing, then again"]
    train_tokenizer(TokenizerConfig(vocab_size=280, min_frequency=1), words, folder)
    return folder
