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
from train.parallel import ParallelContext, split_ranks

HALF = 5
# (ZeRO stage, tensor-parallel ranks, data-parallel ranks, rows split by sequence parallelism)
LAYOUTS = [
    (1, 1, 1, False),
    (1, 1, 2, False),
    (2, 1, 2, False),
    (3, 1, 1, False),
    (3, 1, 2, False),
    (1, 2, 1, False),
    (2, 2, 1, True),
    (1, 2, 2, True),
    (3, 2, 2, False),
]
Layout = tuple[int, int, int, bool]


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
        precision="bf16",  # of which the logits may differ most
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


def write(context: ParallelContext, root: str, layout: Layout, precision: str) -> tuple[list[float], dict]:
    """Train, save in the middle, train on: the undisturbed second half."""
    zero, tensor, _, rows = layout
    context = split_ranks(context, tensor_parallel=tensor, sequence_parallel=rows)
    engine = uneven.make_engine(context, zero=zero, precision=precision)
    steps(engine, context, 0, HALF)
    store = make_store(Path(root), context, zero)
    store.save(engine, step=HALF, tokens=0, state={"updates": engine.updates})
    assert store.finish().problem is None
    return steps(engine, context, HALF, 2 * HALF), uneven.logical_state(engine, context)


def resume(context: ParallelContext, roots: list[str], layout: Layout, precision: str) -> list[tuple[list[float], dict]]:
    """Go on from each checkpoint in a fresh engine."""
    zero, tensor, _, rows = layout
    context = split_ranks(context, tensor_parallel=tensor, sequence_parallel=rows)
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
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, tuple[str, list[float], dict]]:
    found = {}
    for layout in LAYOUTS:
        root = str(tmp_path_factory.mktemp("layout"))
        found[layout] = (root, *run_ranks(write, layout[1] * layout[2], root, layout, "fp32")[0])
    return found


def some_others(layout: Layout) -> list[Layout]:
    """Its own and another in the circle of them: over all layouts, each way to change one part of a layout comes up."""
    place = LAYOUTS.index(layout)
    steps = (0, 2, 3) if place == 2 else (0, 2)  # the third: to ZeRO 2 from ZeRO 1
    return [LAYOUTS[(place + step) % len(LAYOUTS)] for step in steps]


def name_of(layout: Layout) -> str:
    return "zero{}-tensor{}-data{}-rows{}".format(*layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_layout_resumes_from_others(written, layout: Layout) -> None:
    resumes_from(written, layout, some_others(layout))


@pytest.mark.campaign(name="layouts")
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_any_layout_resumes_from_any_other(written, layout: Layout) -> None:
    resumes_from(written, layout, LAYOUTS)


def test_some_others_change_every_part() -> None:
    """(part, from, to): whatever two layouts differ in is met by the few pairs too."""

    def changes(pairs: list[tuple[Layout, Layout]]) -> set[tuple[int, int, int]]:
        return {(part, new[part], old[part]) for new, old in pairs for part in range(4)}

    few = [(layout, other) for layout in LAYOUTS for other in some_others(layout)]
    assert changes(few) == changes([(layout, other) for layout in LAYOUTS for other in LAYOUTS])


def resumes_from(written: dict, layout: Layout, others: list[Layout]) -> None:
    roots = [written[other][0] for other in others]
    resumed = run_ranks(resume, layout[1] * layout[2], roots, layout, "fp32")[0]
    for other, (new_losses, new_state) in zip(others, resumed, strict=True):
        _, losses, state = written[other]
        exact = other == layout
        tolerance = {"rtol": 0, "atol": 0 if exact else 1e-5}
        torch.testing.assert_close(torch.tensor(new_losses), torch.tensor(losses), **tolerance)
        for name, tensor in state.items():
            torch.testing.assert_close(new_state[name], tensor, **tolerance)


@pytest.mark.parametrize(
    "layout",
    [
        *(pytest.param(layout, marks=pytest.mark.further) for layout in [(1, 1, 2, False), (2, 1, 2, False)]),
        (3, 1, 2, False),
        (1, 2, 1, True),
    ],
)
def test_bf16_goes_on_to_the_bit(tmp_path: Path, layout: Layout) -> None:
    losses, state = run_ranks(write, 2, str(tmp_path), layout, "bf16")[0]
    new_losses, new_state = run_ranks(resume, 2, [str(tmp_path)], layout, "bf16")[0][0]
    assert new_losses == losses
    assert all(torch.equal(new_state[name], tensor) for name, tensor in state.items())
