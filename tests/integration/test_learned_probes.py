"""The probes measure something: a model that is trained to repeat what it has read goes from chance to nearly all right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.dist import run_ranks
from tests.distributed.uneven import Batch
from train.config.model import ModelConfig
from train.config.training import OptimConfig, ParallelConfig
from train.engine import Engine
from train.model.blueprint import Blueprint
from train.model.transformer import Reading, build_layers
from train.optim import OptimizerSpec
from train.parallel import ParallelContext
from train.probes.tasks import copying, induction

pytestmark = pytest.mark.further

LENGTH, SEQUENCES, STEPS, LR = 32, 32, 500, 3e-3
IDS = np.arange(1, 40)
MODEL = ModelConfig(
    family="llama", num_layers=2, hidden_size=64, num_heads=4, ffn_size=64, max_positions=LENGTH, vocab_size=40,
    vocab_multiple=8, positions="rotary", norm="rms", mlp="swiglu", bias=False, tied_head=False,
)  # fmt: skip


def repetitions(rng: np.random.Generator) -> Batch:
    """Sequences that repeat 3 to 16 random tokens to their end; how many it are, and which, tells only the text."""
    rows = [
        np.resize(rng.choice(IDS, size=int(rng.integers(3, LENGTH // 2 + 1)), replace=False), LENGTH + 1)
        for _ in range(SEQUENCES)
    ]
    tokens = torch.from_numpy(np.stack(rows))
    return Batch(
        tokens=tokens[:, :-1].reshape(-1),
        labels=tokens[:, 1:].reshape(-1),
        positions=torch.arange(LENGTH).repeat(SEQUENCES),
        document_bounds=torch.tensor([0, SEQUENCES * LENGTH], dtype=torch.int32),
        target_tokens=SEQUENCES * LENGTH,
    )


def shares_right(engine: Engine) -> dict[str, float]:
    shares = {}
    for probe in (copying(IDS, LENGTH), induction(IDS, LENGTH)):
        tokens_NS = torch.from_numpy(probe.tokens_NS)
        places_P = torch.from_numpy(probe.sequence_P * LENGTH + probe.place_P)
        answers = engine.ask(tokens_NS, places_P, torch.from_numpy(probe.options_PO))
        shares[probe.name] = probe.score(answers.log_probability.numpy(), answers.likeliest.numpy()).mean()
    return shares


def learn(context: ParallelContext) -> list[dict[str, float]]:
    """Shares of right answers before and after."""
    engine = Engine(
        build_layers(Blueprint(model=MODEL), Reading(sequence_length=LENGTH, document_mask=False)),
        optimizer=OptimizerSpec(settings=OptimConfig(lr=LR, weight_decay=0.0)),
        parallel=ParallelConfig(),
        precision="fp32",
        micro_batch=SEQUENCES,
        dropout_seed=0,
        context=context,
    )
    engine.initialise(MODEL, seed=3)
    rng, before = np.random.default_rng(0), shares_right(engine)
    for step in range(STEPS):
        engine.train_step([repetitions(rng)], lr=LR * min(1.0, (step + 1) / 30), step=step)
    return [before, shares_right(engine)]


def test_a_model_that_learns_to_repeat_is_told_from_one_that_has_not() -> None:
    before, after = run_ranks(learn, 1)[0]
    assert max(before.values()) < 0.1, before
    assert after["copying"] > 0.95 and after["induction"] > 0.7, after
