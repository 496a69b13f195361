"""The layer list of the model runs through DeepSpeed's PipelineModule as it is: two stages give the losses of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.dist import run_ranks
from tests.distributed import uneven
from tests.distributed.test_zero_parity import reference
from tests.models import initialised
from train.config.model import ModelConfig
from train.config.training import OptimConfig, ParallelConfig
from train.engine.engine import deepspeed_config
from train.model.blueprint import Blueprint
from train.model.transformer import Layer, Reading, build_layers
from train.optim import OptimizerSpec, parameter_groups
from train.parallel import ParallelContext

pytestmark = pytest.mark.further

STEPS = 5


class Stage(nn.Module):
    """A layer as PipelineModule wants it: built on the stage that owns it, a tied weight under one name."""

    def __init__(self, layer: Layer, model: ModelConfig) -> None:
        super().__init__()
        self.inner = initialised(layer.build(), model, seed=7)
        if layer.tied_weight is not None:
            self.weight = self.inner.get_parameter(layer.tied_weight)

    def forward(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.inner(state)


def train(context: ParallelContext, model: ModelConfig) -> list[tuple[float, float]]:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", dist_init_required=False)
    layers = build_layers(Blueprint(model=model), Reading(sequence_length=uneven.SEQUENCE, document_mask=True))
    specs = [
        TiedLayerSpec(layer.tied_key, Stage, layer, model, tied_weight_attr="weight")
        if layer.tied_key
        else LayerSpec(Stage, layer, model)
        for layer in layers
    ]
    micro_batches = uneven.SEQUENCES // uneven.MICRO
    targets = torch.zeros(())
    module = PipelineModule(
        specs,
        topology=PipeModelDataParallelTopology(num_pp=2, num_mp=1, num_dp=1),
        loss_fn=lambda output, _: output[0] * micro_batches / targets,
        partition_method="uniform",
    )
    optim = OptimConfig(lr=uneven.LR, epsilon=uneven.EPSILON, grad_clip=0.5)
    optimizer = torch.optim.AdamW(
        parameter_groups(module, OptimizerSpec(settings=optim)), lr=optim.lr, betas=(0.9, 0.95), eps=optim.epsilon
    )
    config = deepspeed_config(optim, ParallelConfig(zero=1), "fp32", uneven.MICRO)
    config["gradient_accumulation_steps"] = micro_batches
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    curve = []
    for step in range(STEPS):
        ids = list(range(step * uneven.SEQUENCES, (step + 1) * uneven.SEQUENCES))
        batches = [uneven.micro_batch(ids[k : k + uneven.MICRO]) for k in range(0, len(ids), uneven.MICRO)]
        targets.fill_(sum(batch.target_tokens for batch in batches))
        for group in engine.optimizer.param_groups:
            group["lr"] = uneven.lr_of(step)
        loss = engine.train_batch(iter([((b.tokens, b.labels, b.positions, b.document_bounds), b.labels) for b in batches]))
        curve.append((float(loss), float(engine.get_global_grad_norm())))
    return curve


@pytest.mark.parametrize("model", [uneven.TINY, uneven.TINY_GPT2, uneven.TINY_GEMMA], ids=["llama", "gpt2", "gemma"])
def test_two_stages_equal_one_process(model: ModelConfig) -> None:
    expected, _ = reference(model)
    for curve in run_ranks(train, 2, model):
        uneven.assert_same_curve(curve, expected[:STEPS])
