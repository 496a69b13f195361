"""Preferences in the loop: they are learned, a run resumes to the bit, its reference is computed once and kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.dist import run_ranks
from tests.integration import finetuning
from tests.integration.finetuning import attempt, ready, settings
from tools.exactness import differences
from train.config.adapter import LoraConfig
from train.config.method import MethodConfig
from train.config.preference import PreferenceConfig
from train.config.training import EvaluateConfig, OptimConfig, ParallelConfig
from train.metrics.jsonl import read_metrics
from train.parallel import ParallelContext, split_ranks
from train.reference import FACTS_FILE, FOLDER

pytestmark = pytest.mark.further

STEPS, STOP = 12, 6
LORA = MethodConfig(lora=LoraConfig(rank=4, alpha=8.0))
RATE = OptimConfig(lr=3e-4, weight_decay=0.0)


@pytest.fixture(scope="module")
def checkpoint(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetuning.base(tmp_path_factory.mktemp("base"), corpus)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetuning.pairs_file(tmp_path_factory.mktemp("rows"))


def pairs(checkpoint: Path, rows: Path, **changes):
    return settings(checkpoint, rows, kind="preference", **{"optim": RATE} | changes)


def split_attempt(context: ParallelContext, config, run_dir: str, number: int) -> tuple[str, int]:
    layout = config.parallel
    if layout.tensor > 1:
        context = split_ranks(context, tensor_parallel=layout.tensor, sequence_parallel=layout.sequence_parallel)
    return attempt(context, config, run_dir, number)


def run(config, run_dir: Path, *, ranks: int, number: int = 1, ending=("finished", STEPS)) -> Path:
    assert run_ranks(split_attempt, ranks, ready(config, run_dir), str(run_dir), number) == [ending] * ranks
    return run_dir


def records(run_dir: Path, kind: str) -> list[dict]:
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir, "train")]


def references(run_dir: Path) -> list[list[float]]:
    return [np.load(run_dir / FOLDER / f"{split}.npy").tolist() for split in ("train", "validation")]


@pytest.mark.parametrize(("zero", "method"), [(2, LORA), (3, MethodConfig())], ids=["zero2-lora", "zero3-full"])
def test_a_resumed_run_is_the_undisturbed_run(checkpoint: Path, rows: Path, tmp_path: Path, zero, method) -> None:
    whole = run(pairs(checkpoint, rows, zero=zero, method=method), tmp_path / "whole", ranks=2)
    resumed = tmp_path / "resumed"
    stopping = pairs(checkpoint, rows, zero=zero, method=method, stop_at_step=STOP)
    run(stopping, resumed, ranks=2, ending=("stopped", STOP))
    written = (resumed / FOLDER / "train.npy").stat().st_mtime_ns
    run(pairs(checkpoint, rows, zero=zero, method=method), resumed, ranks=2, number=2)
    assert differences(whole, resumed) == []
    assert (resumed / FOLDER / "train.npy").stat().st_mtime_ns == written, "a reference that is there is not computed again"
    first = records(whole, "train")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5), "the model begins as its own reference"
    assert first["task/reward_margin"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        pytest.param(2, ParallelConfig(zero=1), marks=pytest.mark.campaign(name="layouts")),
        pytest.param(2, ParallelConfig(zero=2), marks=pytest.mark.campaign(name="layouts")),
        (2, ParallelConfig(zero=3)),
        pytest.param(2, ParallelConfig(tensor=2), marks=pytest.mark.campaign(name="layouts")),
        (2, ParallelConfig(tensor=2, sequence_parallel=True)),
    ],
    ids=["zero1", "zero2", "zero3", "tensor2", "sequence-parallel"],
)
def test_every_layout_trains_as_one_process(checkpoint: Path, rows: Path, tmp_path: Path, alone: Path, ranks, parallel):
    run_dir = run(pairs(checkpoint, rows, parallel=parallel), tmp_path / "run", ranks=ranks)
    for mine, theirs in zip(references(run_dir), references(alone), strict=True):
        assert mine == pytest.approx(theirs, abs=2e-5)
    assert losses(run_dir) == pytest.approx(losses(alone), abs=2e-5)
    names = ("loss", "task/reward_accuracy", "task/reward_margin", "task/reward_chosen", "task/reward_rejected")
    for mine, theirs in zip(records(run_dir, "evaluation"), records(alone, "evaluation"), strict=True):
        assert [mine[name] for name in names] == pytest.approx([theirs[name] for name in names], abs=1e-4)


@pytest.fixture(scope="module")
def alone(checkpoint: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(pairs(checkpoint, rows), tmp_path_factory.mktemp("alone") / "run", ranks=1)


def test_micro_batches_do_not_matter(checkpoint: Path, rows: Path, tmp_path: Path, alone: Path) -> None:
    """The loss is a mean over the pairs of a step, however many share a micro-batch."""
    config = pairs(checkpoint, rows)
    run_dir = run(replace(config, batch=replace(config.batch, micro_batch=8)), tmp_path / "run", ranks=1)
    assert losses(run_dir) == pytest.approx(losses(alone), abs=2e-5)


def test_it_learns_which_answer_is_preferred(checkpoint: Path, tmp_path: Path) -> None:
    many = finetuning.pairs_file(tmp_path, rows=400, seed=1)
    evaluate = EvaluateConfig(every_steps=10, probes=())
    config = pairs(checkpoint, many, steps=40, optim=OptimConfig(lr=1e-3, weight_decay=0.0), evaluate=evaluate)
    run_dir = run(config, tmp_path / "run", ranks=2, ending=("finished", 40))
    last = records(run_dir, "evaluation")[-1]
    assert last["task/reward_accuracy"] > 0.9 and last["task/reward_margin"] > 0.1 and last["loss"] < 0.6
    assert last["task/reward_chosen"] - last["task/reward_rejected"] == pytest.approx(last["task/reward_margin"], abs=1e-5)


class TestReference:
    def test_of_another_run_is_taken_over(self, checkpoint: Path, rows: Path, tmp_path: Path, alone: Path) -> None:
        """Told by one that is marked: it is damaged to the eye alone, by numbers that only a copy would have."""
        marked = tmp_path / "marked" / FOLDER
        marked.mkdir(parents=True)
        facts = json.loads((alone / FOLDER / FACTS_FILE).read_text())
        from data_pipeline.io import sha256_of

        for split in ("train", "validation"):
            np.save(marked / f"{split}.npy", np.load(alone / FOLDER / f"{split}.npy") + np.float32(1))
            facts["files"][split] = sha256_of(marked / f"{split}.npy")
        (marked / FACTS_FILE).write_text(json.dumps(facts))
        config = pairs(checkpoint, rows, steps=1, preference=PreferenceConfig(reference=str(tmp_path / "marked")))
        run_dir = run(config, tmp_path / "run", ranks=1, ending=("finished", 1))
        assert references(run_dir)[0] == pytest.approx([value + 1 for value in references(alone)[0]])

    def test_of_other_rows_is_refused(self, checkpoint: Path, tmp_path: Path, alone: Path) -> None:
        others = finetuning.pairs_file(tmp_path, rows=40, seed=3)
        config = pairs(checkpoint, others, steps=1, preference=PreferenceConfig(reference=str(alone)))
        with pytest.raises(Exception, match="is of other rows; give a run of the same rows, the same beginning"):
            run(config, tmp_path / "run", ranks=1)

    def test_of_the_same_weights_in_another_model_is_refused(self, checkpoint, rows: Path, tmp_path: Path, alone: Path) -> None:
        config = pairs(checkpoint, rows, steps=1, preference=PreferenceConfig(reference=str(alone)))
        config = replace(config, model=replace(config.model, norm_epsilon=1e-2))
        with pytest.raises(Exception, match="is of other model; give a run of the same rows, the same beginning"):
            run(config, tmp_path / "run", ranks=1)

    @pytest.mark.parametrize("change", ["bits", "base"])
    def test_of_something_else_is_computed_anew(
        self, checkpoint: Path, rows: Path, tmp_path: Path, alone: Path, change
    ) -> None:
        run_dir = tmp_path / "run"
        config = ready(pairs(checkpoint, rows, steps=1), run_dir)
        folder = run_dir / FOLDER
        folder.mkdir()
        facts = json.loads((alone / FOLDER / FACTS_FILE).read_text()) | ({"base": "0" * 64} if change == "base" else {})
        for split in ("train", "validation"):
            data = bytearray((alone / FOLDER / f"{split}.npy").read_bytes())
            data[-1] ^= change == "bits"
            (folder / f"{split}.npy").write_bytes(data)
        (folder / FACTS_FILE).write_text(json.dumps(facts))
        assert run_ranks(attempt, 1, config, str(run_dir), 1) == [("finished", 1)]
        assert references(run_dir) == references(alone)
