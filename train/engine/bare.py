"""DeepSpeed as its documentation shows it, with our model and our settings: what the engine's own work is measured against."""

from __future__ import annotations

from collections.abc import Sequence

from train.config.model import ModelConfig
from train.config.training import ComputePrecision, ParallelConfig
from train.engine import fragments
from train.engine.contract import Batch
from train.engine.engine import build_module, deepspeed_config, initialize
from train.model.transformer import Layer
from train.optim import OptimizerSpec
from train.parallel import ParallelContext


class BareEngine:
    """forward, backward, step on one micro-batch; the loss is the local mean, and nothing is reported."""

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        optimizer: OptimizerSpec,
        parallel: ParallelConfig,
        precision: ComputePrecision,
        micro_batch: int,
        context: ParallelContext,
    ) -> None:
        config = deepspeed_config(optimizer.settings, parallel, precision, micro_batch)
        self._deepspeed, self._optimizer = initialize(build_module(layers, config, context), optimizer, config, context)
        self._zero, self._device = parallel.zero, context.device

    def initialise(self, model: ModelConfig, seed: int) -> None:
        """Begin with the initial values of all weights."""
        fragments.create_state(self._optimizer, self._zero)
        found = fragments.fragments_of(self._deepspeed.module, self._optimizer, self._zero)
        fragments.draw_weights(found, model=model, seed=seed)
        fragments.publish_weights(self._optimizer, self._zero)

    def step(self, batch: Batch) -> float:
        """One optimizer step; the mean loss of a token."""
        tensors = (batch.tokens, batch.labels, batch.positions, batch.document_bounds)
        objective, _, targets = self._deepspeed(*(tensor.to(self._device) for tensor in tensors))
        loss = objective / targets
        self._deepspeed.backward(loss)
        self._deepspeed.step()
        return loss.item()
