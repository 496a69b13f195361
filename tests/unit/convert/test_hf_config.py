"""config.json in the words of old and new readers; a model without a family."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig

from conf.errors import UserError
from tests.parity.pairs import CASES
from tests.unit.convert.checkpoints import GPT2, LLAMA, LLAMA_STRETCHED
from train.config.families import FAMILIES, FamilyName
from train.config.model import RopeConfig
from train.convert.families import FAMILIES as FOREIGN
from train.convert.hf_config import SpecialIds, generation_config, model_config, read_model_config
from train.convert.proof.files import prove_config

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


def test_old_and_new_words_of_other_families():
    rope = RopeConfig(base=700.0, fraction=0.25, scaling="linear", factor=4.0)
    neox = model_config(CASES["gpt-neox"], SPECIAL, "fp32")
    assert (neox["rotary_pct"], neox["rotary_emb_base"], neox["rope_theta"]) == (0.25, 500.0, 500.0)
    neox = _read_back(model_config(replace(CASES["gpt-neox"], rope=rope), SPECIAL, "fp32")).rope_parameters
    expected = {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0, "partial_rotary_factor": 0.25}
    assert {name: neox[name] for name in expected} == expected
    stablelm = _read_back(
        model_config(replace(CASES["stablelm-shared-norm"], num_heads=3, num_kv_heads=1, rope=rope), SPECIAL, "fp32")
    ).rope_parameters
    assert {name: stablelm[name] for name in expected} == expected
    gemma = model_config(CASES["gemma3"], SPECIAL, "fp32")
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"], gemma["sliding_window_pattern"]) == (3000.0, 100.0, 3)
    assert gemma["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_no_id_is_padding_by_a_class_default():
    assert model_config(CASES["gemma2"], SPECIAL, "fp32")["pad_token_id"] is None


def test_a_custom_model_has_no_class():
    custom = replace(LLAMA, family="custom", window=8)
    with pytest.raises(
        UserError, match=r"model\.family=custom: no Hugging Face class .* one of gpt2, gpt_neox, llama, mistral"
    ):
        model_config(custom, SPECIAL, "bf16")


def test_every_family_but_custom_is_written_and_mapped():
    names = set(get_args(FamilyName))
    assert names == set(FAMILIES) == set(FOREIGN) | {"custom"}


@pytest.mark.parametrize("case", CASES)
def test_settings_come_back_as_they_went(case, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(model_config(CASES[case], SPECIAL, "fp32")))
    read = read_model_config(tmp_path)
    assert read.notes == ()
    assert not prove_config(CASES[case], tmp_path, lambda _: read.model).problems
