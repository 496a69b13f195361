"""The kinds of runs that train, by the verb that makes them: what `config.yaml` holds."""

from __future__ import annotations

from train.config.finetune import FinetuneConfig
from train.config.pretrain import PretrainConfig
from train.config.settings import RunSettings

RUNS: dict[str, type[RunSettings]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
