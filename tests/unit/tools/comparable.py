"""Runs, checkpoints and evaluations as they are left on disk, made by hand: without a model and without a training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from conf.compose import write_config
from data_pipeline.config import DataConfig, SourceConfig
from train.checkpoint.manifest import Manifest, StoredFile, file_facts, folder_of
from train.config.imported import ImportedConfig, Origin
from train.config.model import ModelConfig
from train.config.pretrain import PretrainConfig
from train.config.training import BudgetConfig, LaunchConfig, RunConfig
from train.metrics.goodput import Goodput
from train.metrics.record import encode
from train.scores.intervals import measure
from train.scores.record import EXAMPLES_FILE, Evaluation, Example, Score, write_examples
from train.scores.settings import ScoreSettings
from train.scores.sheet import tallies

TINY = ModelConfig(
    family="gpt2", num_layers=2, hidden_size=32, num_heads=2, ffn_size=64, max_positions=64, vocab_size=300,
    positions="learned", norm="layer", mlp="gelu", bias=True, tied_head=True,
)  # fmt: skip


def run_folder(
    folder: Path, *, steps: int = 20, loss: float = 5.0, tokenizer: str = "t" * 64, data: str = "d" * 64, **settings: Any
) -> Path:
    """A run that has done `steps` steps, with a checkpoint at half of them and at the last; none of 0 steps."""
    folder.mkdir(parents=True)
    config = PretrainConfig(
        run=RunConfig(name=folder.name),
        model=TINY,
        data=DataConfig(sources=(SourceConfig(path=str(folder / "gone")),), sequence_length=64),
        budget=BudgetConfig(steps=99),
        launch=LaunchConfig(device="cpu", processes=2),
    )
    config = replace(config, **settings)
    write_config(config, folder / "config.yaml")
    record = {"run_id": "r1", "created": 1.0, "git_commit": "c" * 40, "processes": 2, "versions": {"torch": "2.13"}}
    (folder / "run.json").write_text(json.dumps(record))
    goodput, lines = Goodput(), []
    for step in range(1, steps + 1):
        goodput.add("productive", 1.0)
        place = {"step": step, "attempt": 1, "tokens": 64 * step, "time": 10.0 + step}
        values = {"loss": loss - step / 20, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 64.0}
        lines.append({"kind": "train", **place, **values, **goodput.fields()})
        if step % 10 == 0:
            held_out = {"loss": loss + 0.2 - step / 20, "bits_per_byte": loss / 3, "perplexity": 9.0, "target_tokens": 640}
            lines.append({"kind": "evaluation", **place, **held_out, "probe/copying": step / 40, "seconds": 1.0})
    if lines:
        (folder / "metrics.jsonl").write_bytes(b"".join(map(encode, lines)))
    for step in sorted({steps // 2, steps} - {0}):
        checkpoint(folder_of(folder / "checkpoints", step), config, step, tokenizer=tokenizer, data=data)
    return folder


def checkpoint(
    folder: Path, config: PretrainConfig | ImportedConfig, step: int, *, tokenizer: str = "t" * 64, data: str = "d" * 64
) -> Path:
    """A manifest and a configuration; no weights, which nothing here reads."""
    folder.mkdir(parents=True)
    write_config(config, folder / "config.yaml")
    manifest = Manifest(
        step=step,
        tokens=64 * step,
        layout={"world_size": 2, "tensor": 1, "zero": 1},
        data_fingerprint=data,
        files={"tokenizer/tokenizer.json": StoredFile(bytes=1, sha256=tokenizer)},
        tensors={},
        written_by="import" if isinstance(config, ImportedConfig) else "pretrain",
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def imported(folder: Path) -> Path:
    """An imported checkpoint."""
    return checkpoint(folder, ImportedConfig(model=TINY, origin=Origin(source="models/Tiny", dtype="bf16")), 0)


def evaluate(
    place: Path,
    examples: Sequence[Example],
    *,
    kind: str = "language",
    name: str = "language",
    data: str = "a" * 64,
    settings: ScoreSettings | None = None,
    folder: str | None = None,
    model: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """What `longhaul evaluate checkpoint=PLACE` leaves, for outputs that are made up."""
    settings = settings or ScoreSettings()
    manifest = json.loads((place / "manifest.json").read_text())
    home = place.parent.parent if place.parent.name == "checkpoints" else place
    facts = {"path": str(place), "hash": file_facts(place / "manifest.json").sha256, "parameters": 1, "step": manifest["step"]}
    facts["tokenizer"] = manifest["files"]["tokenizer/tokenizer.json"]["sha256"]
    scores: dict[str, Score] = {}
    if kind != "harness":
        for source, tally in tallies(kind, examples, settings).items():  # type: ignore[arg-type]
            scores |= {f"{source}/{key}" if source else key: score for key, score in measure(tally, resamples=50).items()}
    evaluation = Evaluation(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        model=facts | (model or {}),
        data=[{"name": "held", "path": "/somewhere/held.jsonl", "hash": data, "examples": len(examples)}],
        config={"task": {"kind": kind, "data": [{"path": "x"}]}, "limit": None, "scores": asdict(settings)} | config,
        scores=scores,
        run={"created": 1000.0 + len(list(home.glob("evaluations/*")))},
    )
    target = home / "evaluations" / (folder or f"{place.name}-{name}")
    target.mkdir(parents=True)
    write_examples(target / EXAMPLES_FILE, examples)
    (target / "evaluation.json").write_text(evaluation.to_json())
    return target


def texts(mean: float, *, number: int = 200, seed: int = 0, tokens: int = 50) -> list[Example]:
    """Documents with a loss near `mean` nats a token; how hard each is follows from `seed`."""
    hard_N = np.random.default_rng(seed).normal(0.0, 0.5, number)
    return [
        Example(id=f"held:{place}", loss=tokens * (mean + float(hard)), target_tokens=tokens, target_bytes=200)
        for place, hard in enumerate(hard_N)
    ]


def labelled(
    share_right: float, *, number: int = 200, labels: tuple[str, str] = ("负面", "正面<b>"), seed: int = 0
) -> list[Example]:
    """Rows of two labels, so many of which are told right; those are the same rows for every share."""
    draws_N = np.random.default_rng(seed).random(number)
    found = []
    for place, draw in enumerate(draws_N):
        truth, other = labels[place % 2], labels[1 - place % 2]
        output = truth if draw < share_right else other
        chances = {label: 0.9 if label == output else 0.1 for label in labels}
        found.append(Example(id=f"dev.tsv:{place}", truths=(truth,), output=output, probabilities=chances, input="电影 <i>"))
    return found
