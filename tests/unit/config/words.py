"""Words of the command line for tests: enough of them for a valid run, and what a wrong one is told."""

from __future__ import annotations

import pytest

from conf.compose import compose, validate
from conf.errors import ConfigError
from train.config.pretrain import PretrainConfig

FINETUNE = ["+model=llama_tiny", "initial_checkpoint=runs/a", "task.data=[{path: a.jsonl}]", "data.sequence_length=64"]
ENOUGH = ["model=llama_tiny", "data.sequence_length=64", "budget.steps=5000"]


def pretrain_config(*words: str) -> PretrainConfig:
    """A small valid run with `words` on top."""
    return validate(PretrainConfig, compose("pretrain", [*ENOUGH, *words]))


def problems_of(words: list[str], schema: type = PretrainConfig, root: str = "pretrain") -> tuple[str, ...]:
    """What is wrong with `words`, and nothing else than them."""
    with pytest.raises(ConfigError) as caught:
        validate(schema, compose(root, words))
    return caught.value.problems
