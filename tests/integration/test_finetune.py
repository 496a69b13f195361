"""Fine-tuning in the loop: it learns, resumes to the bit, ends early, keeps the best; every ZeRO stage, adapters too."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from conf.errors import UserError
from tests.dist import run_ranks
from tests.integration import faults, finetuning
from tests.integration.finetuning import attempt, ready, settings
from tools.exactness import differences
from train.checkpoint.manifest import published, resolve_checkpoint, step_of
from train.checkpoint.reader import CheckpointReader
from train.config.adapter import LoraConfig
from train.config.finetune import ScoringConfig
from train.config.method import MethodConfig
from train.config.training import EvaluateConfig, OptimConfig
from train.metrics import Metrics
from train.metrics.jsonl import read_metrics
from train.metrics.record import Level
from train.model.cost import LABEL_HEAD

pytestmark = pytest.mark.further

STEPS, STOP = 12, 6  # the stop is behind an evaluation and a save, on the step of neither
LORA = MethodConfig(lora=LoraConfig(rank=4, alpha=8.0, dropout=0.1))
FROZEN = MethodConfig(frozen=("embedding.*", "blocks.0.*"), neftune_alpha=5.0, layer_decay=0.8)


@pytest.fixture(scope="module")
def checkpoint(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetuning.base(tmp_path_factory.mktemp("base"), corpus)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    return {"classification": finetuning.labelled_file(folder), "generation": finetuning.written_file(folder)}


def whole_run(config, run_dir: Path, *, ranks: int, change: Callable[[], None] | None = None) -> Path:
    endings = run_ranks(attempt, ranks, ready(config, run_dir), str(run_dir), 1, change)
    assert endings == [("finished", STEPS)] * ranks
    return run_dir


def resumed_run(make, run_dir: Path, *, ranks: int, change: Callable[[], None] | None = None) -> Path:
    stopping = ready(make(stop_at_step=STOP), run_dir)
    assert run_ranks(attempt, ranks, stopping, str(run_dir), 1, change) == [("stopped", STOP)] * ranks
    assert run_ranks(attempt, ranks, ready(make(), run_dir), str(run_dir), 2, change) == [("finished", STEPS)] * ranks
    return run_dir


@pytest.mark.parametrize(
    ("kind", "zero", "method"),
    [
        ("classification", 1, MethodConfig()),
        ("generation", 2, LORA),
        pytest.param("generation", 3, FROZEN, marks=pytest.mark.campaign(name="layouts")),
        ("classification", 3, LORA),
    ],
    ids=["labels-zero1", "text-zero2-lora", "text-zero3-frozen", "labels-zero3-lora"],
)
def test_a_resumed_run_is_the_undisturbed_run(
    checkpoint: Path, rows: dict[str, Path], tmp_path: Path, kind: str, zero: int, method: MethodConfig
) -> None:
    def make(**more):
        return settings(checkpoint, rows[kind], kind=kind, zero=zero, method=method, **more)

    reference = whole_run(make(), tmp_path / "whole", ranks=2)
    resumed = resumed_run(make, tmp_path / "resumed", ranks=2)
    assert differences(reference, resumed) == []
    outputs = [sorted((folder / "outputs").glob("*.jsonl")) for folder in (reference, resumed)]
    assert [path.name for path in outputs[0]] == [f"step-{step:08d}.jsonl" for step in (4, 8, 12)]
    assert [path.read_bytes() for path in outputs[0]] == [path.read_bytes() for path in outputs[1]]
    best = [
        json.loads((published(folder / "checkpoints")[-1] / "state.json").read_text())["best"]
        for folder in (reference, resumed)
    ]
    assert best[0] == best[1] and best[0]["steps"]


def test_a_mistake_of_a_resume_is_noticed(checkpoint: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    def make(**more):
        return settings(checkpoint, rows["classification"], method=LORA, **more)

    change = faults.updates_not_restored
    reference = whole_run(make(), tmp_path / "whole", ranks=1, change=change)
    assert differences(reference, resumed_run(make, tmp_path / "resumed", ranks=1, change=change))


def figures(run_dir: Path) -> list[dict]:
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "evaluation"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_says_the_same(checkpoint: Path, rows: dict[str, Path], tmp_path: Path, ranks: int) -> None:
    """Losses and figures on the way do not depend on how the state lies, nor on how many ranks share the rows."""
    found = {}
    for zero in (1, 3) if ranks == 2 else (1,):
        config = settings(checkpoint, rows["generation"], kind="generation", zero=zero, method=MethodConfig())
        run_dir = whole_run(config, tmp_path / f"zero{zero}", ranks=ranks)
        found[zero] = [(record["loss"], record["task/rougeL"]) for record in figures(run_dir)]
    first = found[1]
    for other in found.values():
        assert other == [pytest.approx(pair, rel=1e-4) for pair in first]


def test_it_learns_and_keeps_the_best(checkpoint: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    """A tiny model of random weights tells animals from tools after some epochs; chance is about a half."""
    run_dir = tmp_path / "run"
    many = finetuning.labelled_file(tmp_path, rows=600, seed=1)
    config = settings(checkpoint, many, steps=60, evaluate=EvaluateConfig(every_steps=10, probes=()))
    endings = run_ranks(attempt, 2, ready(config, run_dir), str(run_dir), 1)
    assert endings == [("finished", 60)] * 2
    accuracies = {int(record["step"]): float(record["task/accuracy"]) for record in figures(run_dir)}
    assert max(accuracies.values()) > 0.9
    best = max(accuracies, key=lambda step: (accuracies[step], -step))
    assert step_of(resolve_checkpoint(str(run_dir / "best"))) == best
    assert {step_of(folder) for folder in published(run_dir / "checkpoints")} == {best, 60}


@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_a_metric_that_the_task_has_not_is_told_before_the_first_step(
    checkpoint: Path, rows: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    run_dir = tmp_path / "run"
    config = settings(checkpoint, rows[kind], kind=kind, scoring=ScoringConfig(metric="bleu", max_rows=8))
    (told,) = run_ranks(refusal, 1, ready(config, run_dir), str(run_dir))
    assert told.startswith("scoring.metric=bleu: is no figure of this task; there are loss, perplexity, ")
    assert not (run_dir / "metrics.jsonl").exists() or not read_metrics(run_dir / "metrics.jsonl")


def refusal(context, config, run_dir: str) -> str:
    try:
        attempt(context, config, run_dir, 1)
    except UserError as error:
        return str(error)
    return ""


def test_it_ends_early_and_is_finished_then(checkpoint: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    """At a rate of nothing no evaluation beats the first."""
    run_dir = tmp_path / "run"
    config = settings(
        checkpoint,
        rows["classification"],
        steps=60,
        optim=OptimConfig(lr=1e-12),
        evaluate=EvaluateConfig(every_steps=3, patience=2, probes=()),
    )
    assert run_ranks(attempt, 1, ready(config, run_dir), str(run_dir), 1) == [("finished", 9)]
    assert step_of(resolve_checkpoint(str(run_dir / "best"))) == 3


@pytest.mark.parametrize("labels", [("plant", "stone"), ("plant", "stone", "tool")], ids=["as-many", "one-more"])
def test_a_head_of_other_labels_is_fresh(
    checkpoint: Path, rows: dict[str, Path], tmp_path: Path, labels: tuple[str, ...]
) -> None:
    """At a rate of nothing the head stays what it began as: the same after a classifier as after a language model."""
    first = tmp_path / "first"
    assert run_ranks(attempt, 1, ready(settings(checkpoint, rows["classification"]), first), str(first), 1) == [
        ("finished", STEPS)
    ]
    path = tmp_path / "others.jsonl"
    path.write_text("".join(f'{{"text": "a {number}", "label": "{labels[number % len(labels)]}"}}\n' for number in range(60)))
    heads = []
    for begins_with in (checkpoint, resolve_checkpoint(str(first))):
        run_dir = tmp_path / f"after-{begins_with.name}"
        config = ready(settings(begins_with, path, steps=1, optim=OptimConfig(lr=1e-12, weight_decay=0.0)), run_dir)
        assert run_ranks(attempt, 1, config, str(run_dir), 1) == [("finished", 1)]
        heads.append(CheckpointReader(resolve_checkpoint(str(run_dir))).read(LABEL_HEAD))
    assert heads[0].shape[0] == len(labels) and heads[0].any()
    assert heads[0].equal(heads[1])


def test_another_metric_begins_the_best_anew(checkpoint: Path, rows: dict[str, Path], tmp_path: Path) -> None:
    """No loss is below an accuracy turned negative: patience would end the run, and nothing later be the best."""

    def make(**more):
        evaluate = EvaluateConfig(every_steps=3, patience=2, probes=())
        return settings(checkpoint, rows["classification"], evaluate=evaluate, **more)

    run_dir = tmp_path / "run"
    assert run_ranks(attempt, 1, ready(make(stop_at_step=3), run_dir), str(run_dir), 1) == [("stopped", 3)]
    config = ready(make(scoring=ScoringConfig(metric="loss", max_rows=8)), run_dir)
    assert run_ranks(attempt, 1, config, str(run_dir), 2, partial(keep_alerts, tmp_path / "alerts")) == [("finished", STEPS)]
    losses = {int(record["step"]): float(record["loss"]) for record in figures(run_dir)}
    later = sorted((step for step in losses if step > 3), key=losses.__getitem__)
    assert step_of(resolve_checkpoint(str(run_dir / "best"))) == later[0]
    best = json.loads((published(run_dir / "checkpoints")[-1] / "state.json").read_text())["best"]
    assert best["steps"] == later and best["yardstick"] == "loss with evaluate.max_samples=null"
    (told,) = [line for line in (tmp_path / "alerts").read_text().splitlines() if "anew" in line]
    assert told.startswith("the best is looked for anew: at step 6, ")
    assert told.endswith(", before it was accuracy with scoring.max_rows=null")


def keep_alerts(path: Path) -> None:
    original = Metrics.alert

    def alert(self: Metrics, title: str, text: str, level: Level = "warn") -> None:
        with path.open("a") as file:
            print(f"{title}: {text}", file=file)
        original(self, title, text, level)

    Metrics.alert = alert
