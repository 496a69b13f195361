"""conversion_report.json: what a conversion was made of, and what its proof found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint.reader import CheckpointReader
from train.config.imported import ImportedConfig
from train.convert.publication import Format

if TYPE_CHECKING:
    from train.convert.proof.finding import Finding


NOT_ASKED = "no proof was asked for (proof=false)"


def write_report(
    reader: CheckpointReader,
    path: Path,
    *,
    format: Format,
    dtype: str,
    findings: Sequence[Finding] | None,
    why_none: str = NOT_ASKED,
) -> dict[str, Any]:
    """Write the report to `path`; `dtype` is that of the folder, `findings` None: there was no proof, for the reason given."""
    settings = reader.settings
    libraries = ("torch", "transformers", *(("peft",) if format == "adapter" else ()))
    origin = settings.origin.source if isinstance(settings, ImportedConfig) else settings.run.name
    report = {
        "format": format,
        "family": reader.model.family,
        "written_by": reader.manifest.written_by,
        "origin": origin,
        "step": reader.step,
        "tokens": reader.tokens,
        "dtype": dtype,
        "proved": findings is not None and not any(finding.problems for finding in findings),
        "versions": {name: version(name) for name in libraries} if findings is not None else {},
        "proof": {finding.name: _shown(finding) for finding in findings or ()},
        **({"not_proved": why_none} if findings is None else {}),
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def source_name(text: str) -> str:
    """What a source is called elsewhere: a name on the hub as it is, of a folder its own name alone."""
    path = Path(text).expanduser()
    return path.resolve().name if path.is_absolute() or path.is_dir() else text


def read_report(path: Path) -> dict[str, Any]:
    """The report of a conversion."""
    return json.loads(path.read_text(encoding="utf-8"))


def summary(report: dict[str, Any]) -> list[str]:
    """What the proof found, a line a check."""
    if not report["proof"]:
        return [f"not proved  {report['not_proved']}"]
    proof = report["proof"]
    logits, loss = proof["logits"], proof["held_out_loss"]
    what = "labels" if "rows" in proof else "tokens"
    lines = [
        f"keys        all of {proof['weights']['tensors']} tensors, bit-equal in {report['dtype']}",
        f"logits      differ by at most {logits['max_abs_difference']:.2g} over {logits['positions']} positions, of which the "
        f"last is {logits['last_position']}; {logits['argmax_equal']} likeliest {what} equal",
    ]
    if "rows" in proof:
        lines.append(f"rows        {_rows(proof['rows'])}")
    else:
        lines += [
            f"generation  equal for {proof['generation']['prompts']} prompts",
            f"perplexity  {_both(proof['perplexity'], '.6g')}, of {proof['perplexity']['text']}",
        ]
    if "note" in proof["tokenizer"]:
        lines.append(f"tokenizer   {proof['tokenizer']['note']}")
    if "not_measured" in loss:
        return [*lines, f"loss        not measured: {loss['not_measured']}"]
    return [*lines, f"loss        {_both(loss, '.6f')}, over {loss['targets']:,} held-out tokens"]


def proof_lines(report: dict[str, Any]) -> list[str]:
    """The same for a model card."""
    if not report["proof"]:
        return [f"There is none: {report['not_proved']}."]
    proof = report["proof"]
    logits, loss = proof["logits"], proof["held_out_loss"]
    lines = [
        f"Weights are written in {report['dtype']}. Loaded by {_loaded_by(report['versions'])} and compared in fp32 with the "
        "checkpoint in Longhaul:",
        "",
        f"- logits differ by at most {logits['max_abs_difference']:.2g} over {logits['positions']} positions",
    ]
    if "rows" in proof:
        return [*lines, f"- {_rows(proof['rows'])}"]
    lines.append(f"- perplexity of {proof['perplexity']['text']}: {_both(proof['perplexity'], '.6g')}")
    if "not_measured" in loss:
        return [*lines, "- held-out loss: not measured"]
    return [*lines, f"- held-out loss over {loss['targets']:,} tokens: {_both(loss, '.6f')}"]


def _loaded_by(versions: dict[str, str]) -> str:
    beside = f" and PEFT {versions['peft']}, beside the base," if "peft" in versions else ""
    return f"transformers {versions['transformers']}{beside}"


def _rows(figures: dict[str, Any]) -> str:
    together = " and filled up to one length" if figures["filled_up"] == "yes" else ""
    worst = figures["max_abs_difference"]
    return f"scores of {figures['labels']} labels differ by at most {worst:.2g} for {figures['rows']} rows, alone{together}"


def _both(figures: dict[str, Any], form: str) -> str:
    return f"{figures['longhaul']:{form}} in Longhaul, {figures['transformers']:{form}} in transformers"


def _shown(finding: Finding) -> dict[str, Any]:
    shown = asdict(finding)
    return {"passed": not finding.problems, **shown["figures"]} | (
        {"problems": list(finding.problems)} if finding.problems else {}
    )
