"""`longhaul inspect`: which documents a step read, and whether the data still is what it read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conf.compose import read_config
from conf.errors import ConfigError, UserError
from data_pipeline.ledger import combined, parse_ranges, sample_hash
from train.config.finetune import FinetuneConfig
from train.config.pretrain import PretrainConfig
from train.config.runs import RUNS
from train.config.settings import RunSettings
from train.groundwork.finetuning import ROWS_FOLDER, TOKENIZER_FOLDER
from train.metrics.jsonl import FILE_NAME, read_lines

if TYPE_CHECKING:
    from data_pipeline.loader import SampleSource
    from data_pipeline.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    run: str = ""
    """Folder of a run, such as runs/first."""
    step: int = 0
    """The step, from 1."""
    sample: int | None = None
    """Show this sample of the step alone, with its whole text."""
    limit: int = 8
    """Samples that are shown."""
    characters: int = 200
    """Characters of each sample's text."""

    def __post_init__(self) -> None:
        problems = []
        if not self.run:
            problems.append("run: needs the folder of a run; give run=runs/NAME")
        for name in ("step", "limit", "characters"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: must be at least 1")
        if problems:
            raise ConfigError(problems)


def run(config: InspectConfig) -> int:
    """Print what the step read; 0 when the data still is that, else 1.

    Raises UserError when the run has no such step, or the corpus is gone.
    """
    run_dir = Path(config.run)
    settings = read_config(RUNS, run_dir / "config.yaml")
    found = [
        record for record in read_lines(run_dir / FILE_NAME) if record["kind"] == "train" and record["step"] == config.step
    ]
    if not found:
        raise UserError(f"step={config.step}: {run_dir / FILE_NAME} has no such step; `tail -1` of it shows the last one")
    record = found[-1]
    if "sample_ranges" not in record:
        raise UserError(f"step={config.step}: {run_dir / FILE_NAME} was written before the ranges of samples were kept")
    ranges = parse_ranges(str(record["sample_ranges"]))
    samples = [sample for start, end in ranges for sample in range(start, end)]
    attempts = ", ".join(str(line["attempt"]) for line in found)
    print(f"step             {config.step}, attempt {record['attempt']}" + (f" (of {attempts})" if found[1:] else ""))
    print(f"samples          {len(samples):,}: {record['sample_ranges']}")
    print(f"loss             {record['loss']}, gradient norm {record['grad_norm']}, learning rate {record['lr']}")
    if config.sample is not None and config.sample not in samples:
        raise UserError(f"sample={config.sample}: is not of step {config.step}, which read {record['sample_ranges']}")

    loader, tokenizer = _open(run_dir, settings)
    shown = [config.sample] if config.sample is not None else samples[: config.limit]
    hashes = []
    for sample in samples:
        tokens = loader.micro_batch([sample]).tokens.numpy()
        hashes.append(sample_hash(sample, tokens))
        if sample in shown:
            text = tokenizer.decode(tokens.tolist())
            text = text if config.sample is not None else text[: config.characters]
            print(f"\nsample {sample}, source {loader.source_of(sample)}: {', '.join(loader.describe(sample))}")
            print("  | " + text.replace("\n", "\n  | "))
    left = len(samples) - len(shown)
    print(f"\n{left:,} more samples; sample=N or limit={len(samples)} shows them" if left else "")
    same = combined(hashes) == record["data_hash"]
    verdict = "is what the step read" if same else f"IS NOT what the step read, whose hash is {record['data_hash']}"
    print(f"data             {verdict} (hash {combined(hashes)})")
    return int(not same)


def _open(run_dir: Path, settings: RunSettings) -> tuple[SampleSource, Tokenizer]:
    """The training samples of a run, and its tokenizer."""
    from data_pipeline.encoded_rows import read_encoded
    from data_pipeline.loader import Loader
    from data_pipeline.row_loader import RowLoader
    from data_pipeline.tokenizer import Tokenizer

    seed, vocab_size = settings.run.seed, settings.model.vocab_size
    if isinstance(settings, FinetuneConfig):
        rows = read_encoded(run_dir / ROWS_FOLDER)
        length = settings.sequence_length
        loader = RowLoader(rows, split="train", sequence_length=length, seed=seed, vocab_size=vocab_size)
        return loader, Tokenizer(run_dir / TOKENIZER_FOLDER)
    assert isinstance(settings, PretrainConfig), "there are no others"
    corpus = Loader(settings.data, split="train", seed=seed, vocab_size=vocab_size)
    return corpus, Tokenizer(corpus.tokenizer_folder)
