"""What a model that learns preferences is measured by on its way: the loss of the held-out pairs, and which it would prefer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from conf.errors import UserError
from data_pipeline.pair_loader import PairLoader
from train.config.finetune import FinetuneConfig
from train.engine import Engine
from train.held_out import BeforeBatch, shared_out
from train.metrics import Value
from train.model.preference import PreferenceHead
from train.parallel import ParallelContext
from train.scores.direction import direction


class PreferenceExaminer:
    """Measures the model of `engine`; all ranks together. It draws no random number and leaves nothing changed."""

    def __init__(self, config: FinetuneConfig, *, context: ParallelContext, engine: Engine, loader: PairLoader) -> None:
        """loader: of the held-out pairs. Raises UserError for a metric that preferences do not have."""
        self.config, self.context, self.engine, self.loader = config, context, engine, loader
        self.outputs: tuple[()] = ()
        self.metric = config.metric
        if self.metric not in ("loss", *PreferenceHead.figures):
            known = ", ".join(("loss", *PreferenceHead.figures))
            raise UserError(f"scoring.metric={self.metric}: is no figure of this task; there are {known}")

    def run(self, before_batch: BeforeBatch) -> list[dict[str, Value]]:
        """One record of all held-out pairs."""
        started = time.perf_counter()
        size = self.config.evaluate.micro_batch or self.config.batch.micro_batch
        (samples,) = self.loader.held_out_samples(self.config.evaluate.max_samples).values()
        groups = [samples[first : first + size] for first in range(0, len(samples), size)]
        sums = torch.zeros(2 + len(PreferenceHead.figures), dtype=torch.float64)  # loss, pairs, and the head's figures
        for number, (chosen, counts) in enumerate(shared_out(groups, self.context)):
            before_batch(number)
            result = self.engine.evaluate(self.loader.micro_batch(chosen), compiled=len(chosen) == size)
            if counts:
                sums += torch.tensor([result.loss_sum, result.target_tokens, *result.figures], dtype=torch.float64)
        loss, pairs, *figures = self.context.sum_over_data(sums.to(self.context.device)).tolist()
        found = {f"task/{name}": value / pairs for name, value in zip(PreferenceHead.figures, figures, strict=True)}
        return [{"loss": loss / pairs, "target_tokens": int(pairs), "seconds": time.perf_counter() - started, **found}]

    def criterion(self, records: Sequence[Mapping[str, Value]]) -> float:
        """The metric, turned so that lower is better."""
        name = self.metric if self.metric == "loss" else f"task/{self.metric}"
        return -direction(self.metric) * float(records[0][name])
