"""Learning rates that fall from layer to layer, against tables that are written out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data_pipeline.rows_config import RowsConfig
from data_pipeline.task_config import TaskConfig, TaskSource
from tests.distributed import uneven
from tests.models import initial_decoder
from train.config.adapter import LoraConfig
from train.config.finetune import FinetuneConfig
from train.config.method import MethodConfig
from train.config.model import ModelConfig
from train.config.training import EvaluateConfig, GroupRule, OptimConfig
from train.model.blueprint import Blueprint
from train.model.logical import logical_of
from train.model.transformer import Reading
from train.optim import OptimizerSpec, parameter_groups

UNTIED = replace(uneven.TINY, num_layers=3, tied_head=False)
EXPECTED = {  # with 0.5: half of the layer above
    "head.weight": 1.0,
    "final_norm.weight": 1.0,
    "blocks.2": 0.5,
    "blocks.1": 0.25,
    "blocks.0": 0.125,
    "embedding.tokens.weight": 0.0625,
}
MATRICES = ("attention.qkv.weight", "attention.output.weight", "mlp.gate_up.weight", "mlp.down.weight")


def scales(model: ModelConfig, *, decay: float = 0.5, rules: tuple[GroupRule, ...] = (), lora: LoraConfig | None = None):
    """Name of what trains -> multiple of the run's learning rate."""
    config = FinetuneConfig(
        initial_checkpoint="somewhere",
        model=model,
        task=TaskConfig(kind="dialogue", name="lesson", data=(TaskSource(path="rows.jsonl"),)),
        data=RowsConfig(sequence_length=uneven.SEQUENCE),
        evaluate=EvaluateConfig(probes=()),
        optim=OptimConfig(rules=rules),
        method=MethodConfig(layer_decay=decay, lora=lora),
    )
    reading = Reading(sequence_length=uneven.SEQUENCE, document_mask=True)
    decoder = initial_decoder(Blueprint(model=model, lora=lora), reading, seed=1)
    spec = OptimizerSpec(settings=config.rates, width_ratio=model.width_ratio)
    groups = parameter_groups(decoder, spec)
    return {logical_of(parameter).name: group["lr_scale"] for group in groups for parameter in group["params"]}


def expected(name: str) -> float:
    return next(scale for start, scale in EXPECTED.items() if name == start or name.startswith(f"{start}."))


def test_each_layer_has_half_the_rate_of_the_one_above() -> None:
    found = scales(UNTIED)
    assert found == {name: expected(name) for name in found}
    assert {"embedding.tokens.weight", "final_norm.weight", "head.weight", "blocks.0.mlp_norm.weight"} < set(found)


def test_without_a_decay_all_are_alike() -> None:
    assert set(scales(UNTIED, decay=1.0).values()) == {1.0}


def test_a_tied_head_has_the_rate_of_the_embedding_that_it_is() -> None:
    found = scales(replace(UNTIED, tied_head=True))
    assert found["embedding.tokens.weight"] == 0.0625 and "head.weight" not in found


def test_of_labels_the_head_and_of_learned_positions_the_embedding() -> None:
    found = scales(replace(uneven.TINY_GPT2, labels=("no", "yes")))
    assert found["score.weight"] == 1.0
    assert found["embedding.positions.weight"] == found["embedding.tokens.weight"] == 0.125


def test_adapters_have_the_rate_of_their_block() -> None:
    found = scales(UNTIED, lora=LoraConfig(rank=2))
    assert found and found == {name: expected(name) for name in found}


def test_what_a_rule_names_has_the_rates_of_the_rule() -> None:
    found = scales(UNTIED, rules=(GroupRule(pattern="*.attention.*", lr_scale=3.0), GroupRule(pattern="head.*", lr_scale=2.0)))
    for name, scale in found.items():
        assert scale == (3.0 if ".attention." in name else 2.0 if name == "head.weight" else expected(name)), name


def test_mup_divides_the_rates_of_matrices_besides() -> None:
    found = scales(replace(UNTIED, mup_base_width=8))  # four times as wide
    for name, scale in found.items():
        assert scale == pytest.approx(expected(name) / (4 if name.endswith(MATRICES) else 1)), name


def test_names_of_more_than_nine_blocks_do_not_stand_for_each_other() -> None:
    found = scales(replace(UNTIED, num_layers=11), decay=0.9)
    for number in (0, 1, 10):
        assert found[f"blocks.{number}.mlp.down.weight"] == pytest.approx(0.9 ** (11 - number))
