"""config.json in the words of old and new readers; models that a family cannot hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig

from conf.errors import UserError
from tests.unit.convert.checkpoints import GPT2, LLAMA, LLAMA_STRETCHED
from train.convert.hf_config import SpecialIds, generation_config, model_config

SPECIAL = SpecialIds(bos=None, eos=0)


def _read_back(content):
    values = dict(content)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def test_llama_as_transformers_reads_it():
    read = _read_back(model_config(LLAMA, SPECIAL, "bf16"))
    assert isinstance(read, LlamaConfig)
    assert (read.hidden_size, read.head_dim, read.num_key_value_heads, read.intermediate_size) == (64, 16, 2, 96)
    assert read.max_position_embeddings == 160
    assert read.rope_parameters["rope_theta"] == 5000.0
    assert read.rope_parameters["rope_type"] == "default"
    assert (read.bos_token_id, read.eos_token_id, read.tie_word_embeddings) == (None, 0, False)


def test_rope_is_said_in_old_and_new_words():
    plain = model_config(LLAMA, SPECIAL, "fp32")
    assert plain["rope_theta"] == plain["rope_parameters"]["rope_theta"] == 5000.0
    assert plain["rope_scaling"] is None
    stretched = model_config(LLAMA_STRETCHED, SPECIAL, "fp32")
    assert stretched["rope_theta"] == 5000.0
    assert stretched["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert stretched["rope_parameters"] == stretched["rope_scaling"] | {"rope_theta": 5000.0}
    assert (stretched["attention_bias"], stretched["mlp_bias"], stretched["tie_word_embeddings"]) == (True, True, True)


def test_gpt2_as_transformers_reads_it():
    content = model_config(GPT2, SpecialIds(bos=3, eos=4), "bf16")
    read = _read_back(content)
    assert isinstance(read, GPT2Config)
    assert (read.n_embd, read.n_head, read.n_inner, read.max_position_embeddings) == (48, 3, 112, 160)
    assert (read.bos_token_id, read.eos_token_id) == (3, 4)
    assert content["torch_dtype"] == content["dtype"] == "bfloat16"


def test_generation_config_names_what_there_is():
    assert generation_config(SPECIAL) == {"eos_token_id": [0]}
    assert generation_config(SpecialIds(bos=1, eos=None)) == {"bos_token_id": 1}


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (replace(GPT2, bias=False), "model.bias=False"),
        (replace(GPT2, head_size=8), "model.head_size=8"),
        (replace(GPT2, num_kv_heads=1), "model.num_kv_heads=1"),
        (replace(LLAMA, norm="layer"), "model.norm=layer"),
        (replace(LLAMA, num_heads=6, num_kv_heads=3, head_size=16), "model.num_heads=6"),
    ],
)
def test_a_model_that_the_family_cannot_hold(model, told):
    with pytest.raises(UserError, match=told):
        model_config(model, SPECIAL, "bf16")


def test_all_reasons_are_told_at_once():
    with pytest.raises(UserError) as caught:
        model_config(replace(LLAMA, norm="layer", mlp="gelu", positions="learned"), SPECIAL, "bf16")
    for name in ("norm", "mlp", "positions"):
        assert f"model.{name}=" in str(caught.value)
