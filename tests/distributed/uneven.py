"""Batches with uneven targets and the engine that runs them, for the tests of layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from train.config.kernels import KernelsConfig
from train.config.model import ModelConfig, RopeConfig
from train.config.training import OptimConfig, ParallelConfig
from train.engine import Engine
from train.model.blueprint import Blueprint
from train.model.cost import parameter_shapes
from train.model.logical import LogicalTensor
from train.model.transformer import Reading, build_layers
from train.optim import OptimizerSpec
from train.parallel import ParallelContext

SEQUENCE, SEQUENCES, MICRO = 16, 8, 2
# The gradient of a key bias is zero in theory: without a floor Adam would blow its rounding noise up to full steps.
LR, EPSILON = 3e-3, 1e-5
STEPS = 10
PLAIN = KernelsConfig()
Curve: TypeAlias = Sequence[tuple[float, float]]  # loss and gradient norm of each step
# Clipping is tight enough to be active.
ADAMW = OptimConfig(lr=LR, epsilon=EPSILON, grad_clip=0.5, weight_decay=0.1)

TINY = ModelConfig(
    family="llama", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48, max_positions=SEQUENCE,
    vocab_size=61, vocab_multiple=16, positions="rotary", norm="rms", mlp="swiglu", bias=False, tied_head=True,
)  # fmt: skip
TINY_GPT2 = ModelConfig(
    family="gpt2", num_layers=2, hidden_size=32, num_heads=4, ffn_size=64, max_positions=SEQUENCE,
    vocab_size=61, vocab_multiple=16, positions="learned", norm="layer", mlp="gelu", bias=True, tied_head=True,
)  # fmt: skip
TINY_QWEN3 = replace(TINY, family="qwen3", head_size=12, qk_norm=True)
TINY_LABELS = replace(TINY_QWEN3, labels=("no", "maybe", "yes"), z_loss=0.01)
# Everything that a block can have besides, of the order of Gemma 3; and a block with its sublayers side by side.
TINY_GEMMA = replace(
    TINY, family="custom", head_size=12, qk_norm=True, qkv_bias=True, norm_placement="both", norm_one_plus=True, mlp="geglu",
    embedding_scale=2.0, logit_softcap=2.0, attention_softcap=1.5, window=5, window_pattern="SL",
    local_rope=RopeConfig(base=50),
)  # fmt: skip
# Of the order of OLMo 2; longrope's limit lies among the lengths of documents.
TINY_OLMO2 = replace(
    TINY, family="custom", head_size=12, norm_placement="post", qk_norm=True, qk_norm_across_heads=True, mlp="geglu_exact",
    attention_output_bias=True, norm_one_plus=True, rope=RopeConfig(
        base=50, scaling="longrope", original_max_positions=8, short_factors=(1.0,) * 6, long_factors=(1, 1.5, 2, 4, 8, 8)
    ),
)  # fmt: skip
TINY_PARALLEL = replace(
    TINY_GPT2, family="custom", positions="rotary", rope=RopeConfig(fraction=0.5), residual="parallel_shared"
)


@dataclass(frozen=True)
class Batch:
    """A micro-batch as the engine reads it."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    document_bounds: Tensor
    target_tokens: int
    references: None = None


def lr_of(step: int) -> float:
    """A learning rate that changes at every step."""
    return LR * (1 - step / (2 * STEPS))


def assert_same_curve(curve: Curve, expected: Curve, case: str = "", *, norm_rtol: float = 1e-6) -> None:
    """Losses within 1e-5, gradient norms within that and a millionth of themselves: 8 steps of fp32, which at 128 are 1e-5."""
    columns = (torch.tensor(pairs).unbind(1) for pairs in (curve, expected))
    for name, rtol, found, wanted in zip(("loss", "gradient norm"), (0.0, norm_rtol), *columns, strict=True):
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-5, msg=lambda text, name=name: f"{case} {name}: {text}")


def sample(sample_id: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Tokens, labels, positions and document starts of one sequence; how many labels count differs widely."""
    generator = torch.Generator().manual_seed(1000 + sample_id)
    tokens = torch.randint(0, TINY.vocab_size, (SEQUENCE + 1,), generator=generator)
    labels = tokens[1:].clone()
    labels[: sample_id % (SEQUENCE - 1)] = -100
    cut = 1 + sample_id % (SEQUENCE - 1)
    positions = torch.cat([torch.arange(cut), torch.arange(SEQUENCE - cut)])
    return tokens[:-1], labels, positions, [0, cut]


def label_ends(sample_id: int, tokens: Tensor, num_labels: int) -> Tensor:
    """Labels of one sequence for a model that tells labels apart: two documents have one at their ends, or one, or none has."""
    labels = torch.full((SEQUENCE,), -100)
    ends = (sample_id % (SEQUENCE - 1), SEQUENCE - 1)
    for end in ends[: sample_id % 5 % 3]:
        labels[end] = tokens[: end + 1].sum() % num_labels
    return labels


def micro_batch(sample_ids: list[int], num_labels: int = 0) -> Batch:
    """Several samples as one packed micro-batch; with `num_labels` for a model that tells so many apart."""
    rows = [sample(sample_id) for sample_id in sample_ids]
    starts = [SEQUENCE * row + start for row, (_, _, _, cuts) in enumerate(rows) for start in cuts]
    total = SEQUENCE * len(rows)
    bounds = torch.tensor(starts + [total] * (3 * len(rows) + 1 - len(starts)), dtype=torch.int32)
    labels = torch.cat([row[1] for row in rows])
    if num_labels:
        pairs = zip(sample_ids, rows, strict=True)
        labels = torch.cat([label_ends(sample_id, row[0], num_labels) for sample_id, row in pairs])
    return Batch(
        tokens=torch.cat([row[0] for row in rows]),
        labels=labels,
        positions=torch.cat([row[2] for row in rows]),
        document_bounds=bounds,
        target_tokens=int((labels != -100).sum()),
    )


def batches_of_step(step: int, context: ParallelContext, num_labels: int = 0) -> list[Batch]:
    """This rank's micro-batches of `step`: the same samples whatever the number of ranks."""
    ids = range(step * SEQUENCES, (step + 1) * SEQUENCES)
    passes = SEQUENCES // (MICRO * context.data_parallel)
    chunks = [list(ids[k * MICRO : (k + 1) * MICRO]) for k in range(SEQUENCES // MICRO)]
    mine = [chunks[index * context.data_parallel + context.data_rank] for index in range(passes)]
    return [micro_batch(sample_ids, num_labels) for sample_ids in mine]


def make_engine(
    context: ParallelContext,
    *,
    zero: int,
    precision: str,
    model: ModelConfig = TINY,
    kernels: KernelsConfig = PLAIN,
    optim: OptimConfig = ADAMW,
    **layers: Any,
) -> Engine:
    """A fresh engine for `model`; `layers`: more of the blueprint, such as adapters."""
    blueprint = Blueprint(model=model, kernels=kernels, tensor=context.tensor, **layers)
    reading = Reading(sequence_length=SEQUENCE, document_mask=True)
    engine = Engine(
        build_layers(blueprint, reading),
        optimizer=OptimizerSpec(settings=optim),
        parallel=ParallelConfig(zero=zero, bucket_elements=5000),
        precision=precision,
        micro_batch=MICRO,
        dropout_seed=3,
        context=context,
    )
    engine.initialise(model, seed=7)
    return engine


def logical_state(engine: Engine, context: ParallelContext, *, frozen: bool = False) -> dict[str, Tensor]:
    """Every weight and moment, whole, by 'kind/logical name', on every rank; copies on several ranks are compared.

    `frozen`: of what does not train, in the place of what does.
    """
    pieces = [
        (kind, piece.logical, piece.start, tensor.float().clone())
        for piece in (engine.frozen_fragments() if frozen else engine.fragments())
        for kind, tensor in piece.tensors.items()
    ]
    whole: dict[str, Tensor] = {}
    for rank_pieces in context.gather_to_all(pieces):
        for kind, logical, start, tensor in rank_pieces:
            target = whole.setdefault(f"{kind}/{logical.name}", torch.full(logical.shape, float("nan")))
            part = logical.cut(target).reshape(-1)  # a copy where the slice is not contiguous
            place = part[start : start + tensor.numel()]
            assert place.isnan().all() or torch.equal(place, tensor), f"copies of {kind}/{logical.name} differ"
            place.copy_(tensor)
            logical.cut(target).copy_(part.view(logical.local_shape))
    return whole


def whole(name: str, model: ModelConfig) -> LogicalTensor:
    """A logical tensor as one process holds it."""
    return LogicalTensor(name=name, shape=parameter_shapes(model)[name])
