"""Runs the proof of an export in a clean process, and keeps what it found in conversion_report.json beside the weights."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from train.checkpoint.reader import CheckpointReader
from train.convert.hf_export import TORCH_DTYPES
from train.convert.publication import REPORT

if TYPE_CHECKING:
    from data_pipeline.loader import Loader
    from train.convert.proof import Finding

ROOT = Path(__file__).resolve().parents[2]
NOT_PROVED = 1  # the child's exit code when a check failed; its report says which


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the child is to prove."""

    checkpoint: Path
    folder: Path
    dtype: str
    limit: int | None

    def words(self) -> list[str]:
        """As words of a command line."""
        return [str(self.checkpoint), str(self.folder), self.dtype, "all" if self.limit is None else str(self.limit)]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Task:
        """The task that `words` holds."""
        checkpoint, folder, dtype, limit = words
        return cls(checkpoint=Path(checkpoint), folder=Path(folder), dtype=dtype, limit=None if limit == "all" else int(limit))


def check_can_prove() -> None:
    """Raise UserError when transformers, which the proof is about, is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("proof=true: needs transformers, which is not installed; install it, or give proof=false")


def prove_in_child(task: Task) -> dict[str, Any]:
    """Run the proof in a process without this one's modules, working folder or GPU; returns its report.

    Raises UserError, with every check that failed, when the export is not proved.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "CUDA_VISIBLE_DEVICES": "",  # fp32 on a GPU may be TF32
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, "-P", "-m", "train.convert.prove", *task.words()]
    code = subprocess.run(command, env=environment, check=False).returncode
    if code not in (0, NOT_PROVED) or not (task.folder / REPORT).is_file():
        raise UserError(f"the proof ended with exit code {code} before it was done; nothing was published")
    report = read_report(task.folder)
    problems = [f"{name}: {text}" for name, found in report["proof"].items() for text in found.get("problems", ())]
    if problems:
        lines = "\n".join(f"  - {text}" for text in problems)
        raise UserError(f"the export does not compute what the checkpoint does; nothing was published:\n{lines}")
    return report


def write_report(reader: CheckpointReader, folder: Path, *, dtype: str, findings: Sequence[Finding] | None) -> dict[str, Any]:
    """Write the report; `findings` None: no proof was asked for."""
    report = {
        "format": "hf",
        "family": reader.config.model.family,
        "run": reader.config.run.name,
        "step": reader.step,
        "tokens": reader.tokens,
        "dtype": dtype,
        "proved": findings is not None and not any(finding.problems for finding in findings),
        "versions": {name: version(name) for name in ("torch", "transformers")} if findings is not None else {},
        "proof": {finding.name: _shown(finding) for finding in findings or ()},
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def read_report(folder: Path) -> dict[str, Any]:
    """The report of an export."""
    return json.loads((folder / REPORT).read_text(encoding="utf-8"))


def find_held_out(reader: CheckpointReader) -> Loader | Finding:
    """The held-out text of the run; or a finding, without a problem, that says why it is not there any more."""
    from data_pipeline.facts import inspect_sources
    from data_pipeline.loader import Loader
    from train.convert.proof import Finding

    config = reader.config
    data = replace(config.data, verify="sizes")
    try:
        fingerprint = inspect_sources(data).fingerprint
        loader = Loader(data, split="validation", seed=config.run.seed, vocab_size=config.model.vocab_size)
    except UserError as error:
        return Finding(name="held_out_loss", figures={"not_measured": str(error)})
    if fingerprint != reader.manifest.data_fingerprint:
        changed = "the prepared corpus is not the one that the checkpoint was trained on"
        return Finding(name="held_out_loss", figures={"not_measured": changed})
    return loader


def _shown(finding: Finding) -> dict[str, Any]:
    shown = asdict(finding)
    return {"passed": not finding.problems, **shown["figures"]} | (
        {"problems": list(finding.problems)} if finding.problems else {}
    )


def main(words: Sequence[str]) -> int:
    """The child: prove, write the report; 0 when everything holds."""
    from transformers.utils.logging import disable_progress_bar

    from train.convert.proof import prove

    disable_progress_bar()  # of its own loading; the proof shows its steps itself
    task = Task.parse(words)
    reader = CheckpointReader(task.checkpoint)
    findings = prove(
        reader,
        task.folder,
        tokenizer_folder=reader.tokenizer_folder,
        dtype=TORCH_DTYPES[task.dtype],
        held_out=find_held_out(reader),
        limit=task.limit,
    )
    report = write_report(reader, task.folder, dtype=task.dtype, findings=findings)
    return 0 if report["proved"] else NOT_PROVED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
