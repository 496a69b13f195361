"""What a resumed run may change: every field is in exactly one class, and a fixed one is refused with both values."""

from __future__ import annotations

from collections import Counter

import pytest

from conf.errors import ConfigError
from conf.schema import leaf_names
from tests.unit.config.words import pretrain_config
from train.config.changes import KINDS, changes, check_resume, kind_of
from train.config.finetune import FinetuneConfig
from train.config.pretrain import PretrainConfig

LEAVES = list(dict.fromkeys([*leaf_names(PretrainConfig), *leaf_names(FinetuneConfig)]))


@pytest.mark.parametrize("field", LEAVES)
def test_every_field_has_one_class(field: str) -> None:
    assert kind_of(field) in ("free", "adjustable", "layout", "fixed")


def test_no_entry_of_the_table_is_stale() -> None:
    for entry in KINDS:
        assert any(leaf == entry or leaf.startswith(f"{entry}.") for leaf in LEAVES), f"{entry} is no field"


def test_a_new_section_must_be_entered() -> None:
    with pytest.raises(AssertionError, match=r"brand\.new has no class"):
        kind_of("brand.new")


def test_longest_prefix_decides() -> None:
    assert kind_of("model.dropout") == "adjustable" and kind_of("model.rope.base") == "fixed"
    assert kind_of("batch.micro_batch") == "layout" and kind_of("batch.sequences") == "adjustable"
    assert Counter(map(kind_of, LEAVES)).keys() == {"free", "adjustable", "layout", "fixed"}


def test_nothing_changed() -> None:
    assert changes(pretrain_config(), pretrain_config()) == [] == check_resume(pretrain_config(), pretrain_config(), "x")


@pytest.mark.parametrize(
    ("word", "field", "old", "new"),
    [
        ("model.num_layers=5", "model.num_layers", "4", "5"),
        ("model.num_kv_heads=null", "model.num_kv_heads", "2", "null"),
        ("model.tied_head=false", "model.tied_head", "true", "false"),
        ("model.rope.base=2e4", "model.rope.base", "10000.0", "20000.0"),
        ("optim.kind=muon", "optim.kind", "adamw", "muon"),
        ("run.seed=7", "run.seed", "1234", "7"),
        ("data.sequence_length=32", "data.sequence_length", "64", "32"),
        ("data.document_mask=false", "data.document_mask", "true", "false"),
    ],
)
def test_fixed_field_is_refused_with_both_values(word: str, field: str, old: str, new: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_resume(pretrain_config(), pretrain_config(word), "runs/a/checkpoints/step-00000008")
    (problem,) = caught.value.problems
    assert problem.startswith(f"{field}={new}: runs/a/checkpoints/step-00000008 was trained with {old}, which is fixed")
    assert problem.endswith("put it back, or give another run.name")


def test_all_fixed_fields_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_resume(pretrain_config(), pretrain_config("run.seed=7", "model.ffn_size=64", "optim.lr=1"), "x")
    assert [problem.partition("=")[0] for problem in caught.value.problems] == ["model.ffn_size", "run.seed"]


def test_adjustable_fields_are_recorded_and_the_others_not() -> None:
    words = [
        "optim.lr=0.001",
        "budget.steps=7000",
        "parallel.zero=3",
        "batch.micro_batch=4",
        "run.name=b",
        "launch.processes=2",
    ]
    recorded = check_resume(pretrain_config(), pretrain_config(*words), "x")
    assert [(change.field, change.before, change.after) for change in recorded] == [
        ("budget.steps", 5000, 7000),
        ("optim.lr", 0.0003, 0.001),
    ]
