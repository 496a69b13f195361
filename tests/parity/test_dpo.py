"""Preferences against transformers, whose logits are put into the formula of the paper, and against a training by TRL."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.encoded_rows import read_encoded
from data_pipeline.pair_loader import PairLoader
from data_pipeline.rows_config import RowsConfig
from tests.dist import run_ranks
from tests.integration import finetuning
from tests.parity.hugging_face import named_weights
from tests.parity.pairs import Pair, gradients_of, hf_model
from tests.parity.test_finetune import LENGTH, MODEL
from tests.unit.data_pipeline.labelled import json_lines, prepared, task_of, tokenizer_in
from train.checkpoint.manifest import resolve_checkpoint
from train.checkpoint.reader import CheckpointReader
from train.config.hf_import import ImportConfig
from train.config.preference import PreferenceConfig
from train.config.training import BatchConfig, EvaluateConfig, OptimConfig, ScheduleConfig
from train.convert.keymap import KeyMap
from train.inference.load import assemble_decoder
from train.metrics.jsonl import read_metrics
from train.model.blueprint import Blueprint
from train.model.transformer import Reading
from train.reference import FOLDER
from train.stages import hf_import

pytestmark = pytest.mark.further

STEPS, PAIRS_OF_A_STEP, PAIRS = 6, 4, 60
RATE, EPSILON, BETA = 1e-3, 1e-5, 0.3


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What all sides begin with."""

    folder: Path
    checkpoint: Path
    rows: Path

    def encoded(self) -> list[tuple[Tensor, int]]:
        """The ids of every row of the file, chosen and rejected by turns, and how many of them are its prompt."""
        tokenizer, found = tokenizer_of(self), []
        for line in self.rows.read_text().splitlines():
            row = json.loads(line)
            prompt = tokenizer.encode(row["prompt"])
            for answer in (row["chosen"], row["rejected"]):
                whole = tokenizer.encode(row["prompt"] + answer)
                assert whole[: len(prompt)] == prompt, "no token reaches over the border, so that all agree on it"
                found.append((torch.tensor([*whole, tokenizer.eos_token_id]), len(prompt)))
        return found


def tokenizer_of(lesson: Lesson):
    from transformers import PreTrainedTokenizerFast

    file = str(lesson.folder / "hf/tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>", pad_token="<s>")


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    folder = tmp_path_factory.mktemp("lesson")
    tokenizer_in(folder / "hf")
    hf_model(MODEL).save_pretrained(folder / "hf")
    hf_import.run(ImportConfig(hf=str(folder / "hf"), out=str(folder / "imported"), proof=False))
    draw = random.Random(5)
    words = ["the", "user", "asks", "of", "a", "system", "owl", "says"]

    def some(most: int) -> list[str]:
        return draw.choices(words, k=draw.randint(1, most))

    rows = [
        {"prompt": " ".join(some(4)), "chosen": f" good {' '.join(some(3))}", "rejected": f" bad {' '.join(some(5))}"}
        for _ in range(PAIRS)
    ]
    return Lesson(folder=folder, checkpoint=folder / "imported", rows=json_lines(folder / "pairs.jsonl", *rows))


def log_probability(theirs: nn.Module, ids_N: Tensor, prompt: int) -> Tensor:
    """Of what a row has behind its prompt; the row is read alone."""
    logits_NV = theirs(input_ids=ids_N[:-1].unsqueeze(0)).logits[0]
    return logits_NV[prompt - 1 :].log_softmax(dim=-1).gather(1, ids_N[prompt:, None]).sum()


def formula(theirs: nn.Module, reference: nn.Module, pair: list[tuple[Tensor, int]], settings: PreferenceConfig) -> Tensor:
    """The loss of one pair."""
    ratios = []
    for ids_N, prompt in pair:
        with torch.no_grad():
            before = log_probability(reference, ids_N, prompt)
        ratios.append(log_probability(theirs, ids_N, prompt) - before)
    if settings.loss == "ipo":
        means = [ratio / (len(ids_N) - prompt) for ratio, (ids_N, prompt) in zip(ratios, pair, strict=True)]
        return (means[0] - means[1] - 1 / (2 * settings.beta)) ** 2
    margin, smoothing = settings.beta * (ratios[0] - ratios[1]), settings.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


@pytest.mark.parametrize(
    "settings",
    [
        PreferenceConfig(beta=BETA),
        PreferenceConfig(beta=BETA, label_smoothing=0.1),
        PreferenceConfig(beta=BETA, loss="ipo"),
    ],
    ids=["sigmoid", "smoothed", "ipo"],
)
def test_packed_pairs_have_the_loss_and_gradients_of_the_formula(lesson: Lesson, settings: PreferenceConfig) -> None:
    """Many pairs in a sequence, one in each, and transformers in float64, row by row, with another model as the reference."""
    theirs, reference = hf_model(MODEL, seed=2).double(), hf_model(MODEL).double()
    rows = lesson.encoded()
    total = sum(formula(theirs, reference, rows[first : first + 2], settings) for first in range(0, len(rows), 2))
    (total / PAIRS).backward()
    pair = Pair(model=MODEL, theirs=theirs, keymap=KeyMap(MODEL))
    with torch.no_grad():
        expected_R = np.array([float(log_probability(reference, *row)) for row in rows], dtype=np.float32)
    weights = {name: value.detach().float() for name, value in pair.named_weights().items()}
    for packing in (True, False):
        folder = lesson.folder / f"{settings.loss}-{settings.label_smoothing}-{packing}"
        task = task_of("preference", lesson.rows)
        encoded = prepared(task, tokenizer_in(folder / "tokenizer"), folder / "rows", packing=packing, sequence_length=LENGTH)
        loader = PairLoader(encoded, split="train", sequence_length=LENGTH, seed=3, vocab_size=MODEL.vocab_size)
        loader.references_R = expected_R
        assert (loader.samples_per_epoch < PAIRS) == packing
        batch = loader.micro_batch(range(loader.samples_per_epoch))
        decoder = assemble_decoder(
            Blueprint(model=MODEL, preference=settings),
            lambda name: pair.keymap.to_logical(name, weights.__getitem__),
            reading=Reading(sequence_length=LENGTH, document_mask=True),
        ).requires_grad_()
        objective, loss, pairs, _ = decoder(
            batch.tokens, batch.labels, batch.positions, batch.document_bounds, batch.references
        )
        assert pairs == batch.target_tokens == PAIRS
        (objective / pairs).backward()
        assert float(loss) == pytest.approx(float(total), rel=1e-5)
        gradients = pair.their_gradients()
        for name, found in gradients_of(decoder).items():
            largest = gradients[name].abs().max().item()
            torch.testing.assert_close(
                found.double(), gradients[name], rtol=0, atol=2e-4 * largest, msg=lambda text, n=name: f"{n}: {text}"
            )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run of ours left."""

    losses: list[float]
    accuracies: list[float]
    pairs: list[int]
    """Lines of the file, in the order of the training."""
    reference_R: np.ndarray
    lines_R: list[int]
    """Line of every row, of which the preferred one comes first."""
    checkpoint: CheckpointReader


def our_run(lesson: Lesson, run_dir: Path, settings: PreferenceConfig) -> Trained:
    config = finetuning.settings(
        lesson.checkpoint,
        lesson.rows,
        kind="preference",
        steps=STEPS,
        opening=False,
        data=RowsConfig(sequence_length=LENGTH, validation_fraction=0.0, packing=False),
        batch=BatchConfig(sequences=PAIRS_OF_A_STEP, micro_batch=1),
        optim=OptimConfig(lr=RATE, epsilon=EPSILON, weight_decay=0.0, grad_clip=1.0),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
        evaluate=EvaluateConfig(max_samples=0, probes=()),
        preference=settings,
    )
    config = finetuning.ready(config, run_dir)
    assert run_ranks(finetuning.attempt, 2, config, str(run_dir), 1) == [("finished", STEPS)] * 2
    records = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "train"]
    encoded = read_encoded(run_dir / "rows")
    common = {"sequence_length": LENGTH, "seed": config.run.seed, "vocab_size": MODEL.vocab_size}
    loader = PairLoader(encoded, split="train", **common)

    def line(text: str) -> int:
        return int(text.removesuffix(", rejected").rpartition(":")[2]) - 1

    return Trained(
        losses=[float(record["loss"]) for record in records],
        accuracies=[float(record["task/reward_accuracy"]) for record in records],
        pairs=[line(loader.describe(sample)[0]) for sample in range(STEPS * PAIRS_OF_A_STEP)],
        reference_R=np.load(run_dir / FOLDER / "train.npy"),
        lines_R=[line(text) for text in encoded.row_ids("train")],
        checkpoint=CheckpointReader(resolve_checkpoint(str(run_dir))),
    )


def trl_run(lesson: Lesson, order: list[int], settings: PreferenceConfig, folder: Path) -> tuple[list[float], nn.Module]:
    """Losses of a training by TRL on the pairs in this order, and its model."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    losses: list[float] = []

    class Noting(DPOTrainer):
        def compute_loss(self, *arguments, **named):
            found = super().compute_loss(*arguments, **named)
            losses.append(float(found))
            return found

    lines = lesson.rows.read_text().splitlines()
    trainer = Noting(
        model=hf_model(MODEL),
        ref_model=hf_model(MODEL),
        args=DPOConfig(
            output_dir=str(folder),
            beta=settings.beta,
            loss_type=[settings.loss],
            max_steps=STEPS,
            per_device_train_batch_size=PAIRS_OF_A_STEP,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_epsilon=EPSILON,
            weight_decay=0.0,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=tokenizer_of(lesson),
        train_dataset=Dataset.from_list([json.loads(lines[number]) for number in order]),
    )
    trainer.train()
    return losses, trainer.model


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_a_run_has_the_losses_and_the_weights_of_trl(lesson: Lesson, tmp_path: Path, loss: str) -> None:
    settings = PreferenceConfig(beta=BETA, loss=loss)
    ours = our_run(lesson, tmp_path / "run", settings)
    losses, theirs = trl_run(lesson, ours.pairs, settings, tmp_path / "trl")
    assert losses[-1] < 0.9 * losses[0], "nothing was learned"
    assert ours.losses == pytest.approx(losses, abs=2e-4)
    keymap, weights = KeyMap(MODEL), {name: value.detach() for name, value in named_weights(theirs).items()}
    for name in keymap.logical_shapes:
        expected = keymap.to_logical(name, weights.__getitem__)
        torch.testing.assert_close(
            ours.checkpoint.read(name), expected, rtol=0, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_reference_is_what_transformers_computes(lesson: Lesson, tmp_path: Path) -> None:
    ours = our_run(lesson, tmp_path / "run", PreferenceConfig(beta=BETA))
    theirs, rows = hf_model(MODEL).double(), lesson.encoded()
    assert sorted(ours.lines_R) == sorted([*range(PAIRS)] * 2)
    with torch.no_grad():
        expected = [float(log_probability(theirs, *rows[2 * line + place % 2])) for place, line in enumerate(ours.lines_R)]
    assert ours.reference_R.tolist() == pytest.approx(expected, abs=1e-4)
