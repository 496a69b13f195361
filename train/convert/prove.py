"""Runs the proof of a conversion in a clean process, which keeps what it found in a report."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

from conf.errors import UserError
from train.checkpoint.reader import CheckpointReader
from train.config.finetune import FinetuneConfig
from train.config.imported import ImportedConfig
from train.convert.hf_export import resolve_export_dtype
from train.convert.publication import Format, Unfinished
from train.convert.report import read_report, write_report
from train.convert.weights import WeightFormat

if TYPE_CHECKING:
    from data_pipeline.loader import Loader
    from train.convert.proof.finding import Finding

ROOT = Path(__file__).resolve().parents[2]
NOT_PROVED = 1  # the child's exit code when a check failed; its report says which
Compared: TypeAlias = Literal["fp32", "bf16", "fp16", "stored"]
"""To what the checkpoint's weights were rounded in the folder; stored: to nothing, both hold the same values."""
ROUNDINGS: dict[str, torch.dtype | None] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "stored": None,
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the child is to prove: that a checkpoint and a Hugging Face folder are the same model."""

    checkpoint: Path
    folder: Path
    """The Hugging Face folder; it is only read."""
    dtype: Compared
    report: Path
    """The file to write."""
    limit: int | None = None
    """Most held-out sequences to read; None: all."""
    tokenizer: Path | None = None
    """Folder of the tokenizer that transformers reads; None: `folder`."""
    weights: WeightFormat = "safetensors"
    """Format of the folder's weight files."""
    made: Format = "hf"
    """What was made; an adapter is held against the checkpoint beside its base, by PEFT."""

    def words(self) -> list[str]:
        """As words of a command line."""
        limit = "all" if self.limit is None else str(self.limit)
        paths = (self.checkpoint, self.folder, self.report, self.tokenizer or self.folder)
        return [*(str(path.absolute()) for path in paths), self.dtype, limit, self.weights, self.made]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Task:
        """The task that `words` holds."""
        checkpoint, folder, report, tokenizer, dtype, limit, weights, made = words
        assert dtype in get_args(Compared), f"{dtype} is none of {get_args(Compared)}"
        return cls(
            checkpoint=Path(checkpoint),
            folder=Path(folder),
            dtype=dtype,
            report=Path(report),
            limit=None if limit == "all" else int(limit),
            tokenizer=None if tokenizer == folder else Path(tokenizer),
            weights=weights,
            made=made,
        )


def has_peft() -> bool:
    """Whether PEFT, which the proof of adapters is about, is installed."""
    return importlib.util.find_spec("peft") is not None


def check_can_prove() -> None:
    """Raise UserError when transformers, which the proof is about, is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("proof=true: needs transformers, which is not installed; install it, or give proof=false")


def child_environment() -> dict[str, str]:
    """Environment of the process that proves."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "CUDA_VISIBLE_DEVICES": "",  # fp32 on a GPU may be TF32
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        # A fixed threshold: glibc raises its own up to 32 MiB, and weights that come and go then leave a heap with holes,
        # hundreds of MiB of it.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    }


def prove_in_child(task: Task) -> dict[str, Any]:
    """Run the proof in a process without this one's modules, working folder or GPU; returns its report.

    Raises UserError, with every check that failed, when the conversion is not proved.
    """
    task.report.unlink(missing_ok=True)  # of an earlier proof
    command = [sys.executable, "-P", "-m", "train.convert.prove", *task.words()]
    # Logits are kept in a file for a while: where the weights are is room, the usual place may be memory.
    with TemporaryDirectory(dir=task.report.parent, prefix=".proof-") as scratch:
        environment = child_environment() | {"TMPDIR": str(Path(scratch).absolute())}
        code = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
    if code not in (0, NOT_PROVED) or not task.report.is_file():
        raise Unfinished(
            f"the proof ended with exit code {code} before it was done; nothing was published. The weights that were written "
            f"are kept, the same command goes on with them"
        )
    report = read_report(task.report)
    problems = [f"{name}: {text}" for name, found in report["proof"].items() for text in found.get("problems", ())]
    if problems:
        lines = "\n".join(f"  - {text}" for text in problems)
        raise UserError(f"the folder is not the model of the checkpoint; nothing was published:\n{lines}")
    return report


def find_held_out(reader: CheckpointReader) -> Loader | Finding:
    """The held-out text of the run; or a finding, without a problem, that says why it is not there any more."""
    from data_pipeline.facts import inspect_sources
    from data_pipeline.loader import Loader
    from train.convert.proof.finding import Finding

    if reader.model.labels:
        told = "the model tells labels apart: longhaul evaluate measures it on rows with labels"
        return Finding(name="held_out_loss", figures={"not_measured": told})
    if isinstance(reader.settings, ImportedConfig):
        return Finding(name="held_out_loss", figures={"not_measured": "the model was imported, and nothing was held out"})
    config = reader.config
    if isinstance(config, FinetuneConfig):
        told = "the model was fine-tuned on rows: longhaul evaluate measures it on those that are held out"
        return Finding(name="held_out_loss", figures={"not_measured": told})
    try:
        facts = inspect_sources(config.data)
        loader = Loader(
            config.data,
            split="validation",
            seed=config.run.seed,
            vocab_size=config.model.vocab_size,
            manifests=facts.manifests,
        )
    except UserError:  # its text has paths of this machine, and the report goes out with the model
        return Finding(name="held_out_loss", figures={"not_measured": "the prepared corpus is gone, or cannot be read"})
    if facts.fingerprint != reader.manifest.data_fingerprint:
        changed = "the prepared corpus is not the one that the checkpoint was trained on"
        return Finding(name="held_out_loss", figures={"not_measured": changed})
    return loader


def main(words: Sequence[str]) -> int:
    """The child: prove, write the report; 0 when everything holds."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of its own loading; the proof shows its steps itself
    task = Task.parse(words)
    reader = CheckpointReader(task.checkpoint)
    dtype = resolve_export_dtype("auto", reader) if task.dtype == "stored" else task.dtype
    report = write_report(reader, task.report, format=task.made, dtype=dtype, findings=_findings(task, reader))
    return 0 if report["proved"] else NOT_PROVED


def _findings(task: Task, reader: CheckpointReader) -> list[Finding]:
    from train.convert.hf_config import read_model_config
    from train.convert.proof.checks import Subject, prove

    held_out = find_held_out(reader)
    if task.made == "adapter":
        from train.convert.proof.adapters import prove_adapters

        return prove_adapters(reader, task.folder, held_out=held_out)
    subject = Subject(folder=task.folder, tokenizer=task.tokenizer or task.folder, weights=task.weights)
    return prove(
        reader,
        subject,
        rounding=ROUNDINGS[task.dtype],
        held_out=held_out,
        limit=task.limit,
        read_back=lambda folder: read_model_config(folder).model,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
