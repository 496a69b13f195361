"""What is hashed of settings stays what it was when fields are added, and tells settings apart that differ."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from conf.frozen import hashed_fields
from data_pipeline.io import sha256_of_texts
from data_pipeline.row_preparation import ROWS_FIELDS
from data_pipeline.rows_config import RowsConfig
from tests.distributed import uneven
from train.config.model import ModelConfig, RopeConfig
from train.reference import MODEL_FIELDS, ROPE_FIELDS, hash_of_model

LONG = RopeConfig(scaling="longrope", short_factors=(1.0, 1.1, 1.2, 1.5), long_factors=(1.0, 2.0, 3.0, 4.0))
MODELS = (uneven.TINY, uneven.TINY_GPT2, uneven.TINY_GEMMA, uneven.TINY_LABELS, replace(uneven.TINY, rope=LONG, z_loss=1e-4))


@dataclass(frozen=True, kw_only=True)
class Later(ModelConfig):
    """A model of a later version."""

    experts: int = 0
    a_window: tuple[int, ...] = ()


def later(model: ModelConfig, **more: object) -> Later:
    return Later(**{field.name: getattr(model, field.name) for field in fields(model)}, **more)


def test_a_hash_is_what_it_was() -> None:
    """When the fields were those of today, it was that of what Python shows."""
    assert tuple(field.name for field in fields(ModelConfig))[: len(MODEL_FIELDS)] == MODEL_FIELDS
    assert tuple(field.name for field in fields(RopeConfig))[: len(ROPE_FIELDS)] == ROPE_FIELDS
    of_today = (len(MODEL_FIELDS), len(ROPE_FIELDS)) == (len(fields(ModelConfig)), len(fields(RopeConfig)))
    for model in MODELS if of_today else ():
        assert hash_of_model(replace(model, dropout=0.3)) == sha256_of_texts([repr(replace(model, dropout=0.0))])
    assert hash_of_model(uneven.TINY) == "0bfd016b3844b8bac5bfe5ef9ded8adf3c60e9e42a86ffc7c37bb90efddf567c"


def test_new_fields_count_where_they_are_used() -> None:
    for model in MODELS:
        assert hash_of_model(later(model)) == hash_of_model(model)
    used = {hash_of_model(later(uneven.TINY, **more)) for more in ({}, {"experts": 2}, {"experts": 3}, {"a_window": (1,)})}
    assert len(used) == 4


def test_settings_that_differ_are_told_apart() -> None:
    assert len({hash_of_model(model) for model in MODELS}) == len(MODELS)
    changed = replace(uneven.TINY, rope=replace(uneven.TINY.rope, base=5000.0))
    assert hash_of_model(changed) != hash_of_model(uneven.TINY)


def test_fields_of_rows() -> None:
    assert list(hashed_fields(RowsConfig(), ROWS_FIELDS)) == list(ROWS_FIELDS)
    assert hashed_fields(RowsConfig(bad_rows="drop"), ROWS_FIELDS)["bad_rows"] == "drop"
    assert "bad_rows" not in hashed_fields(RowsConfig(bad_rows="drop"), ROWS_FIELDS, without=("bad_rows",))
