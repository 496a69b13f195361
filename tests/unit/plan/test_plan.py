"""The plan: hand-computed sizes, the batch ramp against a step-by-step simulation, and what cannot be planned."""

from __future__ import annotations

import dataclasses

import pytest

from conf.errors import ConfigError
from tests.unit.config.words import ENOUGH, pretrain_config
from train.config.pretrain import PretrainConfig
from train.plan import BatchRamp, describe, make_plan


def settings(*words: str) -> PretrainConfig:
    """A run without a warm-up whose vocabulary is known."""
    return pretrain_config("model.vocab_size=500", "schedule.warmup_steps=0", *words)


def in_tokens(tokens: int, *words: str) -> PretrainConfig:
    return settings("budget.steps=null", f"budget.tokens={tokens}", *words)


def test_hand_computed_case() -> None:
    plan = make_plan(settings("batch.sequences=48", "batch.micro_batch=4", "budget.steps=100"), 3)
    assert (plan.world_size, plan.data_parallel, plan.micro_batch, plan.sequence_length) == (3, 3, 4, 64)
    assert plan.tokens_per_step == 48 * 64 == 3072
    assert plan.micro_batches_at(0) == plan.micro_batches_at(10**9) == 4  # 48 / (4 x 3)
    assert (plan.total_steps, plan.total_samples, plan.total_tokens) == (100, 4800, 307_200)
    assert plan.warmup_samples == 0


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [(1, 1), (512, 1), (513, 2), (1024, 2), (51_200, 100), (51_201, 101)],  # a step is 8 x 64 = 512 tokens
)
def test_budget_in_tokens_rounds_up_to_whole_steps(tokens: int, steps: int) -> None:
    plan = make_plan(in_tokens(tokens, "batch.sequences=8"), 1)
    assert (plan.total_steps, plan.total_tokens) == (steps, steps * 512)


def test_budget_in_steps_and_in_the_same_tokens_is_the_same_plan() -> None:
    words = ["batch.sequences=8", "batch.ramp_start=2", "batch.micro_batch=2", "batch.ramp_samples=40"]
    by_steps = make_plan(settings("budget.steps=50", *words), 1)
    assert make_plan(in_tokens(by_steps.total_tokens, *words), 1) == by_steps


def simulated(config: PretrainConfig, ramp: BatchRamp) -> tuple[list[int], list[int]]:
    """(batch of each step, samples consumed before each), one step after another, as a loop would do it."""
    batches: list[int] = []
    consumed = [0]
    while (
        len(batches) < config.budget.steps
        if config.budget.steps is not None
        else consumed[-1] * config.data.sequence_length < config.budget.tokens
    ):
        batches.append(naive_batch(ramp, consumed[-1]))
        consumed.append(consumed[-1] + batches[-1])
    return batches, consumed


def naive_batch(ramp: BatchRamp, consumed: int) -> int:
    """The ramp cut into equal stages of samples, one size for each."""
    sizes = list(range(ramp.start, ramp.full, ramp.increment))
    for stage, size in enumerate(sizes):
        if consumed * len(sizes) < (stage + 1) * ramp.samples:
            return size
    return ramp.full


@pytest.mark.parametrize("budget", [["budget.steps=400"], ["budget.steps=7"], ["budget.steps=null", "budget.tokens=130000"]])
@pytest.mark.parametrize(
    ("start", "increment", "samples"),
    [(4, 4, 100), (4, None, 999), (8, 12, 500), (16, 16, 333), (32, 4, 50), (4, 28, 77), (4, 4, 1)],
)
def test_ramp_against_a_simulation(start: int, increment: int | None, samples: int, budget: list[str]) -> None:
    words = [f"batch.ramp_start={start}", f"batch.ramp_samples={samples}", "batch.sequences=32", "batch.micro_batch=4"]
    words += [f"batch.ramp_increment={increment}"] if increment else []
    config = settings(*words, *budget, "schedule.warmup_steps=5")
    plan = make_plan(config, 1)
    batches, consumed = simulated(config, plan.ramp)
    assert [plan.batch_at(place) for place in consumed[:-1]] == batches
    assert [plan.micro_batches_at(place) * 4 for place in consumed[:-1]] == batches
    assert (plan.total_steps, plan.total_samples) == (len(batches), consumed[-1])
    assert plan.warmup_samples == consumed[5]
    assert batches == sorted(batches) and set(batches) <= set(plan.ramp.sizes())


def test_ramp_reaches_the_full_batch_exactly_when_it_says() -> None:
    ramp = BatchRamp(full=32, start=8, increment=8, samples=90)
    assert [ramp.at(place) for place in (0, 29, 30, 59, 60, 89, 90, 10**9)] == [8, 8, 16, 16, 24, 24, 32, 32]
    assert ramp.sizes() == [8, 16, 24, 32]


def test_no_ramp_is_the_full_batch_from_the_start() -> None:
    assert BatchRamp(full=8, start=8, increment=8, samples=0).at(0) == 8
    assert BatchRamp(full=8, start=8, increment=8, samples=0).sizes() == [8]


@pytest.mark.parametrize("ramp_samples", [0, 200])
def test_warm_up_beyond_the_ramp(ramp_samples: int) -> None:
    words = ["batch.sequences=8", "batch.micro_batch=2", "schedule.warmup_steps=300"]
    words += ["batch.ramp_start=2", f"batch.ramp_samples={ramp_samples}"] if ramp_samples else []
    config = settings(*words)
    plan = make_plan(config, 1)
    assert plan.warmup_samples == simulated(config, plan.ramp)[1][300]


@pytest.mark.parametrize(
    ("words", "ranks", "expected"),
    [
        (
            ["batch.sequences=8", "batch.micro_batch=4"],
            3,
            "batch.sequences=8: must be a multiple of batch.micro_batch=4 x 3 data-parallel ranks = 12; "
            "change batch.sequences, batch.micro_batch or the number of processes",
        ),
        (
            ["batch.sequences=32", "batch.micro_batch=4", "batch.ramp_start=4", "batch.ramp_samples=99"],
            2,
            "batch.ramp_start=4: in steps of 4 the ramp passes through 4, 12, 20, ... sequences, and each size must be a "
            "multiple of batch.micro_batch=4 x 2 data-parallel ranks = 8; change batch.ramp_start or batch.ramp_increment",
        ),
        (
            ["budget.steps=null", "budget.tokens=51200", "batch.sequences=8", "schedule.warmup_steps=101"],
            1,
            "schedule.warmup_steps=101: must not exceed the run's 100 steps; shorten the warm-up or raise the budget",
        ),
        (
            ["schedule=wsd", "budget.steps=100", "schedule.warmup_steps=30", "schedule.decay_fraction=0.8"],
            1,
            "schedule.decay_fraction=0.8: the decay begins before the warm-up of 30 steps has ended, in a run of 100 steps; "
            "it can be at most 0.700, or shorten schedule.warmup_steps",
        ),
    ],
)
def test_what_cannot_be_planned(words: list[str], ranks: int, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(settings(*words), ranks)
    assert caught.value.problems == (expected,)


def test_all_that_is_wrong_with_a_plan_is_told_at_once() -> None:
    words = ["budget.steps=null", "budget.tokens=51200", "batch.sequences=8", "schedule.warmup_steps=101"]
    with pytest.raises(ConfigError) as caught:
        make_plan(settings(*words), 3)
    assert [problem.partition("=")[0] for problem in caught.value.problems] == ["batch.sequences", "schedule.warmup_steps"]


def test_parts_of_the_schedule_that_just_fit() -> None:
    words = ["schedule=wsd", "budget.steps=100", "schedule.warmup_steps=20", "schedule.decay_fraction=0.8"]
    assert make_plan(settings(*words), 1).total_steps == 100
    assert make_plan(settings("schedule.warmup_steps=100", "budget.steps=100"), 1).warmup_samples == 100 * 256


def test_plan_is_frozen() -> None:
    plan = make_plan(settings(), 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.total_steps = 3  # type: ignore[misc]


def test_description_holds_the_numbers() -> None:
    config = settings(
        "batch.sequences=8", "batch.micro_batch=2", "budget.steps=100", "batch.ramp_start=4", "batch.ramp_samples=80"
    )
    plan = make_plan(config, 2)
    text = "\n".join(describe(plan, config, precision="bf16 (auto)", train_tokens=100_000))
    assert "ranks            2 (2 data-parallel x 1 tensor-parallel), ZeRO 1, bf16 (auto)" in text
    assert "step             8 sequences x 64 = 512 tokens; 2 micro-batches of 2 on each rank" in text
    assert "ramp             4 -> 8 sequences over 80 samples" in text
    assert f"{plan.total_tokens / 100_000:.2f} epochs of the corpus" in text and "100 steps" in text
    assert f"{plan.parameters:,} parameters" in text


def test_everything_starts_from_a_valid_run() -> None:
    assert ENOUGH and make_plan(settings(), 1).total_steps == 5000
