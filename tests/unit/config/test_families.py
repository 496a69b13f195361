"""What a family cannot hold is refused when the configuration is made, with the way out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conf.errors import ConfigError
from tests.parity.pairs import CASES
from tests.unit.config.words import problems_of
from train.config.model import RopeConfig

YARN = RopeConfig(scaling="yarn")
REFUSED = [
    ("gpt2", {"bias": False}, "bias=false: family=gpt2 has true; take that, or family=custom, which trains"),
    ("gpt2", {"head_size": 8}, "head_size=8: family=gpt2 has 16"),
    ("gpt2", {"num_kv_heads": 1}, "num_kv_heads=1: family=gpt2 has 3"),
    ("llama-gqa", {"norm": "layer"}, "norm=layer: family=llama has rms"),
    ("llama-gqa", {"num_heads": 15, "head_size": 8}, "num_heads=15: family=llama has 12"),
    ("llama-gqa", {"qkv_bias": True}, "attention_output_bias=false: family=llama has true"),
    ("llama-gqa", {"attention_scale": 0.5}, "attention_scale=0.5: family=llama has 0.35355"),
    ("llama-gqa", {"rope": RopeConfig(fraction=0.5)}, "rope.fraction=0.5: family=llama has 1.0"),
    ("llama-gqa", {"window": 8}, "window=8: family=llama has null"),
    ("llama-gqa", {"attention_output_bias": True}, "attention_output_bias=true: family=llama has false"),
    ("llama-mha-biases", {"attention_output_bias": False}, "attention_output_bias=false: family=llama has true"),
    ("llama-gqa", {"mlp": "geglu_exact"}, "mlp=geglu_exact: family=llama has swiglu"),
    ("phi3", {"rope": YARN}, "rope.scaling=yarn: family=phi3 has none or longrope"),
    ("olmo2", {"qk_norm_across_heads": False}, "qk_norm_across_heads=false: family=olmo2 has true"),
    ("gemma", {"qkv_bias": True}, "attention_output_bias=false: family=gemma has true"),
    ("gemma3", {"local_rope": YARN}, "local_rope.scaling=yarn: family=gemma3 has none"),
    ("exaone4", {"qk_norm_across_heads": True}, "qk_norm_across_heads=true: family=exaone4 has false"),
    ("mistral", {"window_pattern": "SL"}, "window_pattern=SL: family=mistral has S"),
    ("qwen2", {"qkv_bias": None}, "qkv_bias=false: family=qwen2 has true"),
    ("qwen2", {"head_size": 20}, "head_size=20: family=qwen2 has 12"),
    ("qwen3", {"qk_norm": False}, "qk_norm=false: family=qwen3 has true"),
    ("gemma2", {"window_pattern": "SSL"}, "window_pattern=SSL: family=gemma2 has SL"),
    ("gemma2", {"embedding_scale": 1.0}, "embedding_scale=1.0: family=gemma2 has 8.485"),
    ("gemma2", {"attention_scale": 0.3}, "attention_scale=0.3: family=gemma2 has 0.30151"),
    ("gemma2", {"window": None, "window_pattern": "S"}, "window=null: family=gemma2 has 160"),
    ("gemma3", {"attention_softcap": 30.0}, "attention_softcap=30.0: family=gemma3 has null"),
    ("gemma3", {"window_pattern": "LSS"}, "window_pattern=LSS: family=gemma3 has SSL"),
    ("gemma3", {"local_rope": RopeConfig(scaling="linear")}, "local_rope.scaling=linear: family=gemma3 has none"),
    ("gemma3", {"local_rope": None}, "local_rope.scaling=linear: family=gemma3 has none"),  # then it is that of rope
    ("gpt-neox", {"residual": "parallel_shared"}, "residual=parallel_shared: family=gpt_neox has sequential or parallel;"),
    ("stablelm-shared-norm", {"mlp": "geglu"}, "mlp=geglu: family=stablelm has swiglu"),
    ("exaone4", {"norm_placement": "both"}, "norm_placement=both: family=exaone4 has post"),
]


@pytest.mark.parametrize(("case", "changed", "told"), REFUSED)
def test_what_a_family_cannot_hold(case: str, changed: dict, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(CASES[case], **changed)
    assert any(problem.startswith(told) for problem in caught.value.problems), caught.value.problems
    replace(CASES[case], family="custom", **changed)


def test_all_reasons_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        replace(CASES["llama-gqa"], norm="layer", mlp="gelu", positions="learned")
    assert [problem.split("=")[0] for problem in caught.value.problems] == ["positions", "norm", "mlp"]


def test_it_is_told_before_a_run_is_planned() -> None:
    words = ["model=llama_tiny", "data.sequence_length=64", "budget.steps=5000", "model.window=32"]
    (problem,) = problems_of(words)
    assert problem.startswith("model.window=32: family=llama has null; take that, or family=custom")
    assert problems_of([*words, "model.family=custom", "model.num_layers=0"]) == ("model.num_layers=0: must be at least 1",)


def test_a_family_is_not_held_against_a_model_that_makes_no_sense() -> None:
    with pytest.raises(ConfigError) as caught:
        replace(CASES["llama-gqa"], norm="layer", num_layers=0)
    assert caught.value.problems == ("num_layers=0: must be at least 1",)
