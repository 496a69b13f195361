"""Whole fine-tuning runs against transformers and PEFT: rows from a file, encoded, packed and trained on by us; and by a few
lines of torch that take the same rows one by one, each encoded by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.encoded_rows import read_encoded
from data_pipeline.row_loader import RowLoader
from data_pipeline.rows_config import RowsConfig
from tests.dist import run_ranks
from tests.integration import finetuning
from tests.models import initial_decoder
from tests.parity.adapters import THEIRS, adapters_as_ours, peft_config
from tests.parity.hugging_face import named_weights
from tests.parity.pairs import CASES, Pair, gradients_of, hf_model
from tests.unit.data_pipeline.labelled import json_lines, prepared, task_of, tokenizer_in
from train.checkpoint.manifest import resolve_checkpoint
from train.checkpoint.reader import CheckpointReader
from train.config.adapter import LoraConfig
from train.config.finetune import FinetuneConfig
from train.config.hf_import import ImportConfig
from train.config.method import MethodConfig
from train.config.training import BatchConfig, EvaluateConfig, OptimConfig, ScheduleConfig
from train.convert.keymap import KeyMap
from train.metrics.jsonl import read_metrics
from train.model.blueprint import Blueprint
from train.model.logical import logical_parameters
from train.model.transformer import Reading
from train.stages import hf_import

pytestmark = pytest.mark.further

MODEL = replace(CASES["llama-gqa"], vocab_size=304)
LORA = LoraConfig(rank=4, alpha=8)
LENGTH, SEQUENCES, STEPS, ROWS = 64, 8, 20, 300
# Without a floor Adam would blow the rounding noise of gradients that are nearly zero up to full steps.
RATE, EPSILON, CLIP = 3e-3, 1e-5, 1.0
# Ranks, and sequences of a micro-batch: of a step each rank has 8, 4, 2 or, on two ranks, 2 micro-batches.
LAYOUTS = [(1, 1), (1, 2), (1, 4), (2, 2)]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What both sides begin with."""

    folder: Path
    checkpoint: Path
    rows: Path

    @property
    def end_of_document(self) -> int:
        return self.tokenizer.token_to_id("<|endoftext|>")

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_file(str(self.folder / "hf/tokenizer.json"))

    def encoded(self) -> list[tuple[Tensor, int]]:
        """The ids of every row of the file, and how many of them are its prompt."""
        found = []
        for line in self.rows.read_text().splitlines():
            row = json.loads(line)
            prompt = self.tokenizer.encode(row["prompt"]).ids
            whole = self.tokenizer.encode(row["prompt"] + row["completion"]).ids
            assert whole[: len(prompt)] == prompt, "no token reaches over the border, so that all agree on it"
            found.append((torch.tensor([*whole, self.end_of_document]), len(prompt)))
        return found


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    """A random model of transformers, imported, and rows of one to some thirty targets."""
    folder = tmp_path_factory.mktemp("lesson")
    tokenizer_in(folder / "hf")
    hf_model(MODEL).save_pretrained(folder / "hf")
    hf_import.run(ImportConfig(hf=str(folder / "hf"), out=str(folder / "imported"), proof=False))
    draw = random.Random(5)
    words = ["the", "user", "asks", "of", "a", "system", "owl", "says", "three", "things"]
    rows = [
        {
            "prompt": " ".join(draw.choices(words, k=draw.randint(1, 9))),
            "completion": "".join(f" {word}" for word in draw.choices(words[:3], k=draw.choice((1, 1, 2, 7, 14)))),
        }
        for _ in range(ROWS)
    ]
    return Lesson(folder=folder, checkpoint=folder / "imported", rows=json_lines(folder / "rows.jsonl", *rows))


def settings(lesson: Lesson, *, micro_batch: int, method: MethodConfig) -> FinetuneConfig:
    return finetuning.settings(
        lesson.checkpoint,
        lesson.rows,
        kind="generation",
        steps=STEPS,
        opening=False,
        data=RowsConfig(sequence_length=LENGTH, validation_fraction=0.0),
        batch=BatchConfig(sequences=SEQUENCES, micro_batch=micro_batch),
        optim=OptimConfig(lr=RATE, epsilon=EPSILON, weight_decay=0.1, grad_clip=CLIP),
        schedule=ScheduleConfig(warmup_steps=3),
        evaluate=EvaluateConfig(max_samples=0, probes=()),
        method=method,
    )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run of ours left."""

    losses: list[float]
    rates: list[float]
    rows: list[list[int]]
    """Of every step: the lines of the file."""
    checkpoint: CheckpointReader


def our_run(lesson: Lesson, run_dir: Path, *, ranks: int, micro_batch: int, method: MethodConfig) -> Trained:
    config = finetuning.ready(settings(lesson, micro_batch=micro_batch, method=method), run_dir)
    assert run_ranks(finetuning.attempt, ranks, config, str(run_dir), 1) == [("finished", STEPS)] * ranks
    records = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "train"]
    common = {"sequence_length": LENGTH, "seed": config.run.seed, "vocab_size": MODEL.vocab_size}
    loader = RowLoader(read_encoded(run_dir / "rows"), split="train", **common)
    return Trained(
        losses=[float(record["loss"]) for record in records],
        rates=[float(record["lr"]) for record in records],
        rows=[
            [int(row.rpartition(":")[2]) - 1 for sample in range(step * SEQUENCES, (step + 1) * SEQUENCES)
             for row in loader.describe(sample)]
            for step in range(STEPS)
        ],
        checkpoint=CheckpointReader(resolve_checkpoint(str(run_dir))),
    )  # fmt: skip


def row_loss(theirs: nn.Module, ids_N: Tensor, prompt: int) -> Tensor:
    """Summed over what the row has behind its prompt; the row is read alone."""
    logits_NV = theirs(input_ids=ids_N[:-1].unsqueeze(0)).logits[0]
    return F.cross_entropy(logits_NV[prompt - 1 :], ids_N[prompt:], reduction="sum")


def their_run(theirs: nn.Module, lesson: Lesson, steps: Sequence[Sequence[int]], rates: Sequence[float]) -> list[float]:
    """Losses of a training on the rows of each step, one row after the other."""
    trained = [value for value in theirs.parameters() if value.requires_grad]
    matrices, vectors = ([value for value in trained if (value.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPSILON)
    encoded, losses = lesson.encoded(), []
    for rows, rate in zip(steps, rates, strict=True):
        targets = sum(len(encoded[row][0]) - encoded[row][1] for row in rows)
        total = 0.0
        for row in rows:
            loss = row_loss(theirs, *encoded[row])
            (loss / targets).backward()
            total += loss.item()
        losses.append(total / targets)
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_same(ours: Trained, losses: Sequence[float], weights: dict[str, Tensor]) -> None:
    assert losses[-1] < losses[0] - 0.3, "nothing was learned"
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(losses), rtol=0, atol=1e-4)
    for name, expected in weights.items():
        found = ours.checkpoint.read(name)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@cache
def expected(lesson: Lesson, steps: tuple[tuple[int, ...], ...], rates: tuple[float, ...]) -> tuple[list[float], dict]:
    """Their losses, and their weights at the end by our names."""
    theirs = hf_model(MODEL)
    losses = their_run(theirs, lesson, steps, rates)
    keymap, weights = KeyMap(MODEL), {name: value.detach() for name, value in named_weights(theirs).items()}
    return losses, {name: keymap.to_logical(name, weights.__getitem__) for name in keymap.logical_shapes}


@pytest.mark.parametrize(("ranks", "micro_batch"), LAYOUTS)
def test_a_run_has_the_losses_and_the_weights_of_transformers(
    lesson: Lesson, tmp_path: Path, ranks: int, micro_batch: int
) -> None:
    """However its sequences are shared out, though each holds another number of rows, and each row of targets."""
    ours = our_run(lesson, tmp_path / "run", ranks=ranks, micro_batch=micro_batch, method=MethodConfig())
    assert len({len(rows) for rows in ours.rows}) > 1, "steps of as many rows each prove less"
    assert_same(ours, *expected(lesson, tuple(map(tuple, ours.rows)), tuple(ours.rates)))


@pytest.mark.parametrize("lora", [LORA, replace(LORA, dora=True, rslora=True)], ids=["lora", "dora"])
def test_a_run_with_adapters_has_those_of_peft(lesson: Lesson, tmp_path: Path, lora: LoraConfig) -> None:
    ours = our_run(lesson, tmp_path / "run", ranks=2, micro_batch=2, method=MethodConfig(lora=lora))
    theirs = peft.get_peft_model(hf_model(MODEL), peft_config(lora))
    begin_alike(theirs, lora)
    losses = their_run(theirs, lesson, ours.rows, ours.rates)
    assert_same(ours, losses, adapters_as_ours(theirs, MODEL, lora))


def begin_alike(theirs: nn.Module, lora: LoraConfig) -> None:
    """Give PEFT's first matrices the random values of ours; the second ones begin at zero on both sides."""
    reading = Reading(sequence_length=LENGTH, document_mask=True)
    seed = 11  # of finetuning.settings
    drawn = logical_parameters(initial_decoder(Blueprint(model=MODEL, lora=lora), reading, seed=seed))
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in drawn.items():
            if name.endswith("lora_a.weight"):
                _, number, *layer, _, _ = name.split(".")
                parts = THEIRS[".".join(layer)]
                firsts = value.reshape(len(parts), lora.rank, -1)
                for module, first_RI in zip(parts, firsts, strict=True):
                    key = f"base_model.model.model.layers.{number}.{module}.lora_A.default.weight"
                    named[key].copy_(first_RI)


def test_packed_rows_have_the_gradients_of_rows_alone(lesson: Lesson) -> None:
    """All rows in full sequences, all rows with a sequence each, and transformers row by row."""
    theirs = hf_model(MODEL)
    pair = Pair(model=MODEL, theirs=theirs, keymap=KeyMap(MODEL))
    losses, gradients = [], []
    for packing in (True, False):
        folder = lesson.folder / f"packing-{packing}"
        encoded = prepared(task_of("generation", lesson.rows), tokenizer_in(folder / "tokenizer"), folder / "rows",
                           packing=packing, sequence_length=LENGTH)  # fmt: skip
        loader = RowLoader(encoded, split="train", sequence_length=LENGTH, seed=3, vocab_size=MODEL.vocab_size)
        assert (loader.samples_per_epoch < ROWS / 2) if packing else (loader.samples_per_epoch == ROWS)
        batch = loader.micro_batch(range(loader.samples_per_epoch))
        decoder = pair.ours(LENGTH, document_mask=True)
        objective, loss, targets = decoder(batch.tokens, batch.labels, batch.positions, batch.document_bounds)
        assert targets == batch.target_tokens
        (objective / targets).backward()
        losses.append(float(loss / targets))
        gradients.append(gradients_of(decoder))
    rows = lesson.encoded()
    total = sum(len(ids_N) - prompt for ids_N, prompt in rows)
    assert total == batch.target_tokens
    summed = 0.0
    for ids_N, prompt in rows:
        loss = row_loss(theirs, ids_N, prompt)
        (loss / total).backward()
        summed += loss.item()
    losses.append(summed / total)
    gradients.append(pair.their_gradients())
    assert losses == [pytest.approx(losses[0], abs=1e-5)] * 3
    for name, packed in gradients[0].items():
        for alone in gradients[1:]:
            torch.testing.assert_close(packed, alone[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
