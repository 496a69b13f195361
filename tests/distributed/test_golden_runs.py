"""Runs made by older code continue as they did: their next five losses are compared with those that were recorded.

All of a run that decides its numbers is in them: weights, moments and update count of the checkpoint, sample order, dropout,
optimizer, schedule. They are resumed by the configuration on their disk, whose old spellings the program has to understand.
The runs are made by `tests/golden/make_runs.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conf.compose import read_config
from data_pipeline import sampler
from tests.dist import run_ranks
from tests.golden import recorded
from train.attempt import Attempt
from train.config.runs import RUNS
from train.config.settings import RunSettings
from train.engine import Engine
from train.launch import get_ready
from train.metrics.jsonl import FILE_NAME, read_metrics
from train.optim import OptimizerSpec
from train.parallel import ParallelContext, split_ranks
from train.stages import training
from train.stages.training import train

BOUND = 1e-4
"""Relative: another CPU adds in another order. A wrong key or constant changes the losses by more within five steps."""


def go_on(
    context: ParallelContext, config: RunSettings, run_dir: str, change: Callable[[], None] | None = None
) -> tuple[str, int]:
    """(state, step) in which one rank ends. `change` alters the program first; the rank's process ends with it."""
    if change is not None:
        change()
    layout = config.parallel
    context = split_ranks(context, tensor_parallel=layout.tensor, sequence_parallel=layout.sequence_parallel)
    record = json.loads((Path(run_dir) / "run.json").read_text(encoding="utf-8"))
    ending, step = train(config, context, Attempt(run_dir=Path(run_dir), number=2), run=record)
    return ending.state, step


def check(name: str, change: Callable[[], None] | None = None) -> None:
    """Resume a run below the working folder to its end; fails when what it does is not what was recorded."""
    run_dir, expected = recorded.copied(name, Path()), recorded.expected(name)
    before = read_metrics(run_dir / FILE_NAME)
    facts = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    config = read_config(RUNS, run_dir / "config.yaml")
    ready = get_ready(replace(config, budget=replace(config.budget, stop_at_step=None)))
    assert ready is not None, "it is not finished"
    config, _ = ready
    processes = config.launch.processes or 1
    endings = run_ranks(go_on, processes, config, str(run_dir), change)
    assert endings == [("finished", expected.train[-1]["step"])] * processes

    records = read_metrics(run_dir / FILE_NAME)[len(before) :]
    for kind, truths in (("train", expected.train), ("evaluation", expected.evaluation)):
        own = [record for record in records if record["kind"] == kind]
        assert [record["step"] for record in own] == [truth["step"] for truth in truths], kind
        for field in truths[0]:
            assert [record[field] for record in own] == pytest.approx([truth[field] for truth in truths], rel=BOUND), field
        # What reads a run's metrics finds the keys in all of it, whichever version wrote a line.
        keys = {key for record in before if record["kind"] == kind for key in record}
        assert keys <= {key for record in own for key in record}, kind
    assert facts.keys() <= json.loads((run_dir / "run.json").read_text(encoding="utf-8")).keys()


@pytest.fixture(autouse=True)
def among_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths in the settings of the runs are relative."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", recorded.NAMES)
def test_an_old_run_goes_on_as_it_did(name: str) -> None:
    check(name)


def another_beta() -> None:
    original = training.optimizer_of

    def changed(config: RunSettings) -> OptimizerSpec:
        spec = original(config)
        return replace(spec, settings=replace(spec.settings, beta2=0.95))

    training.optimizer_of = changed


def another_dropout_key() -> None:
    original = Engine._seed_dropout
    Engine._seed_dropout = lambda self, step, micro_batch: original(self, step + 1, micro_batch)


def another_sampler_constant() -> None:
    sampler.NUM_ROUNDS -= 2


@pytest.mark.parametrize("change", [another_beta, another_dropout_key, another_sampler_constant])
def test_a_changed_constant_is_noticed(change: Callable[[], None]) -> None:
    with pytest.raises(AssertionError, match=r"^loss\n"):
        check("preference-zero1-tensor1", change)
