"""A checkpoint of any layout goes on under any other; under its own it goes on to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.config import DataConfig
from tests.dist import run_ranks
from tests.distributed import uneven
from train.checkpoint.store import CheckpointStore
from train.config.pretrain import PretrainConfig
from train.config.training import BudgetConfig, CheckpointConfig, ParallelConfig, ScheduleConfig
from train.parallel import ParallelContext

HALF = 5
LAYOUTS = [(1, 1), (1, 2), (2, 2), (3, 1), (3, 2)]  # (ZeRO stage, ranks)


def make_store(root: Path, context: ParallelContext, zero: int) -> CheckpointStore:
    tokenizer = root / "tokenizer"
    if context.is_first:
        tokenizer.mkdir(parents=True, exist_ok=True)
        (tokenizer / "tokenizer.json").write_text("{}")
    context.barrier()
    config = PretrainConfig(
        model=uneven.TINY,
        data=DataConfig(sequence_length=uneven.SEQUENCE),
        budget=BudgetConfig(steps=2 * HALF),
        parallel=ParallelConfig(zero=zero),
        schedule=ScheduleConfig(kind="constant"),
    )
    return CheckpointStore(
        root / "checkpoints",
        config=CheckpointConfig(),
        context=context,
        run_config=config,
        tokenizer_folder=tokenizer,
        data_fingerprint="none",
    )


def steps(engine, context: ParallelContext, first: int, last: int) -> list[float]:
    return [
        engine.train_step(uneven.batches_of_step(step, context), lr=uneven.LR, step=step).loss for step in range(first, last)
    ]


def write(context: ParallelContext, root: str, zero: int, precision: str) -> tuple[list[float], dict]:
    """Train, save in the middle, train on: the undisturbed second half."""
    engine = uneven.make_engine(context, zero=zero, precision=precision)
    steps(engine, context, 0, HALF)
    store = make_store(Path(root), context, zero)
    store.save(engine, step=HALF, tokens=0, state={"updates": engine.updates})
    return steps(engine, context, HALF, 2 * HALF), uneven.logical_state(engine, context)


def resume(context: ParallelContext, roots: list[str], zero: int, precision: str) -> list[tuple[list[float], dict]]:
    """Go on from each checkpoint in a fresh engine."""
    found = []
    for root in roots:
        engine = uneven.make_engine(context, zero=zero, precision=precision)
        for fragment in engine.fragments():  # what is not loaded must show
            for tensor in fragment.tensors.values():
                tensor.fill_(7.0)
        assert make_store(Path(root), context, zero).load_newest(engine) is not None
        found.append((steps(engine, context, HALF, 2 * HALF), uneven.logical_state(engine, context)))
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], tuple[str, list[float], dict]]:
    found = {}
    for zero, world_size in LAYOUTS:
        root = str(tmp_path_factory.mktemp(f"zero{zero}-ranks{world_size}"))
        found[zero, world_size] = (root, *run_ranks(write, world_size, root, zero, "fp32")[0])
    return found


@pytest.mark.parametrize(("zero", "world_size"), LAYOUTS)
def test_any_layout_goes_on_from_any_other(written, zero: int, world_size: int) -> None:
    roots = [root for root, _, _ in written.values()]
    resumed = run_ranks(resume, world_size, roots, zero, "fp32")[0]
    for (layout, (_, losses, state)), (new_losses, new_state) in zip(written.items(), resumed, strict=True):
        exact = layout == (zero, world_size)
        tolerance = {"rtol": 0, "atol": 0 if exact else 1e-5}
        torch.testing.assert_close(torch.tensor(new_losses), torch.tensor(losses), **tolerance)
        for name, tensor in state.items():
            torch.testing.assert_close(new_state[name], tensor, **tolerance)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_goes_on_to_the_bit(tmp_path: Path, zero: int) -> None:
    losses, state = run_ranks(write, 2, str(tmp_path), zero, "bf16")[0]
    new_losses, new_state = run_ranks(resume, 2, [str(tmp_path)], zero, "bf16")[0][0]
    assert new_losses == losses
    assert all(torch.equal(new_state[name], tensor) for name, tensor in state.items())
