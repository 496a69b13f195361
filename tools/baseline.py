"""`longhaul baseline`: what a table of token pairs reaches on the same text, so that a small model's loss means something.

Interpolated Kneser-Ney bigram (Kneser and Ney 1995, in the form of Chen and Goodman 1999):

    p(b | a) = max(c(a, b) - D, 0) / c(a) + D n(a) / c(a) x p_cont(b)

with c the counts over the very samples that the run read, n(a) the number of kinds of followers of a, and p_cont(b) in
proportion to the number of kinds of predecessors of b. D is the value that fits a held-back twentieth of those samples best.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from conf.compose import read_config
from conf.errors import ConfigError, UserError
from data_pipeline.ledger import parse_ranges
from train.config.pretrain import PretrainConfig
from train.metrics.jsonl import FILE_NAME, read_metrics

DISCOUNTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
HELD_BACK = 20  # every so-manieth sample is set aside to choose the discount
IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    run: str = ""
    """Folder of a pretraining run, such as runs/first."""
    margin: float = 0.0
    """Nats a token that the model's loss has to lie below the bigram's at least; where it does not, the exit code is 1."""

    def __post_init__(self) -> None:
        problems = []
        if not self.run:
            problems.append("run: needs the folder of a pretraining run; give run=runs/NAME")
        if self.margin < 0:
            problems.append(f"margin={self.margin}: must not be negative; 0 asks for a loss below the bigram's")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class Bigram:
    """Counts of token pairs, sorted by `key` = first x vocabulary + second."""

    vocab_size: int
    key_P: np.ndarray
    count_P: np.ndarray
    total_V: np.ndarray
    followers_V: np.ndarray
    continuation_V: np.ndarray

    def log_probability(self, first_N: np.ndarray, second_N: np.ndarray, discount: float) -> np.ndarray:
        """ln p(second | first) of each pair, in nats; a token never seen as first falls back to p_cont."""
        wanted_N = first_N * self.vocab_size + second_N
        place_N = np.searchsorted(self.key_P, wanted_N).clip(max=len(self.key_P) - 1)
        count_N = np.where(self.key_P[place_N] == wanted_N, self.count_P[place_N], 0.0)
        total_N = np.maximum(self.total_V[first_N], 1.0)
        lower_N = self.continuation_V[second_N]
        kept_N = np.maximum(count_N - discount, 0.0) / total_N
        spread_N = discount * self.followers_V[first_N] / total_N * lower_N
        return np.log(np.where(self.total_V[first_N] > 0, kept_N + spread_N, lower_N))


def fit(first_N: np.ndarray, second_N: np.ndarray, vocab_size: int) -> Bigram:
    """Count the pairs. Half a count is added to every continuation, so that no token is impossible."""
    key_P, count_P = np.unique(first_N * vocab_size + second_N, return_counts=True)
    continuation_V = np.bincount(key_P % vocab_size, minlength=vocab_size) + 0.5
    return Bigram(
        vocab_size=vocab_size,
        key_P=key_P,
        count_P=count_P.astype(np.float64),
        total_V=np.bincount(first_N, minlength=vocab_size).astype(np.float64),
        followers_V=np.bincount(key_P // vocab_size, minlength=vocab_size).astype(np.float64),
        continuation_V=continuation_V / continuation_V.sum(),
    )


def run(config: BaselineConfig) -> int:
    """Fit the bigram on what the run read, score the held-out split, print both losses and write `baseline.json`.

    Returns 1 where the model is not below the bigram, or by less than the margin; otherwise 0. Raises UserError when the
    folder is no run, or the run has no evaluation yet.
    """
    run_dir = Path(config.run)
    settings = read_config(PretrainConfig, run_dir / "config.yaml")
    records = read_metrics(run_dir / FILE_NAME)
    # Those with a name are of one source; here all of them count together.
    evaluations = [line for line in records if line["kind"] == "evaluation" and not line.get("name")]
    if not evaluations:
        raise UserError(f"{run_dir}: has no evaluation yet; run it with evaluate.every_steps, or to its end")
    last = evaluations[-1]
    samples = [
        sample
        for record in records
        if record["kind"] == "train" and record["step"] <= last["step"]
        for start, end in parse_ranges(str(record["sample_ranges"]))
        for sample in range(start, end)
    ]
    discount, loss, targets = baseline_loss(settings, samples)
    model_loss = float(last["loss"])
    report = {
        "step": last["step"],
        "samples": len(samples),
        "bigram_loss": loss,
        "bigram_discount": discount,
        "model_loss": model_loss,
        "held_out_targets": targets,
        "difference": loss - model_loss,
    }
    (run_dir / "baseline.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    verdict = "below" if model_loss < loss else "NOT below"
    print(f"held-out loss    {model_loss:.4f} nats a token after step {last['step']:,} ({targets:,} targets)")
    print(f"bigram model     {loss:.4f} nats a token, fitted on the same {len(samples):,} samples (Kneser-Ney, D = {discount})")
    perplexities = f"{math.exp(model_loss):.2f} to {math.exp(loss):.2f}"
    print(f"the model is     {abs(loss - model_loss):.4f} nats {verdict} the bigram; perplexity {perplexities}")
    return verdict_of(loss - model_loss, config.margin)


def verdict_of(difference: float, margin: float) -> int:
    """The exit code for a model so far below the bigram; says on stderr what is missing."""
    if difference > 0 and difference >= margin:
        return 0
    print(f"the model has to be {margin} nats below the bigram: {margin - difference:.4f} are missing", file=sys.stderr)
    return 1


def baseline_loss(settings: PretrainConfig, samples: Sequence[int]) -> tuple[float, float, int]:
    """(discount, held-out loss in nats a target, number of targets) of the bigram fitted on the samples of these numbers."""
    from data_pipeline.loader import Loader

    vocab_size = settings.model.vocab_size
    common = {"seed": settings.run.seed, "vocab_size": vocab_size}
    loader = Loader(settings.data, split="train", **common)
    first, second, sample = _pairs(loader, samples, "reading the run's samples")
    back = sample % HELD_BACK == 0
    trial = fit(first[~back], second[~back], vocab_size) if len(samples) >= HELD_BACK else fit(first, second, vocab_size)
    discount = max(DISCOUNTS, key=lambda value: trial.log_probability(first[back], second[back], value).mean())
    held_out = Loader(settings.data, split="validation", **common)
    chosen = [sample for numbers in held_out.held_out_samples(settings.evaluate.max_samples).values() for sample in numbers]
    held_first, held_second, _ = _pairs(held_out, chosen, "reading the held-out split")
    scores = fit(first, second, vocab_size).log_probability(held_first, held_second, discount)
    return discount, float(-scores.mean()), len(scores)


def _pairs(loader: object, samples: Sequence[int], title: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token, target, number of the sample) of every target in the samples."""
    parts = []
    for start in tqdm(range(0, len(samples), 64), desc=title, leave=False, disable=None):
        ids = list(samples[start : start + 64])
        batch = loader.micro_batch(ids)
        labels = batch.labels.numpy()
        owner = np.repeat(np.array(ids), len(labels) // len(ids))
        counts = labels != IGNORE
        parts.append((batch.tokens.numpy()[counts], labels[counts], owner[counts]))
    first, second, owner = (np.concatenate(column) for column in zip(*parts, strict=True))
    return first, second, owner
