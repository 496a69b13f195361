"""Export: a checkpoint becomes a Hugging Face model folder, proved before it appears."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from train.checkpoint.manifest import resolve_checkpoint
from train.checkpoint.reader import CheckpointReader
from train.config.export import ExportConfig
from train.convert.card import model_card
from train.convert.hf_config import check_expressible
from train.convert.hf_export import resolve_export_dtype, write_model
from train.convert.prove import Task, check_can_prove, prove_in_child, write_report
from train.convert.publication import Publication


def run(config: ExportConfig) -> int:
    """Write, prove and publish; tells what was found. Returns the exit code.

    Raises UserError, and publishes nothing, when the checkpoint cannot be trusted or expressed, or the proof fails.
    """
    if config.proof:
        check_can_prove()
    reader = CheckpointReader(resolve_checkpoint(config.checkpoint))
    check_expressible(reader.config.model)  # before its files are read, which takes long
    dtype = resolve_export_dtype(config.dtype, reader.config)
    out = Path(config.out) if config.out is not None else default_folder(reader)
    with Publication(out, overwrite=config.overwrite) as folder:
        print(f"{reader.path.name}: checking its files, then writing {dtype} weights", file=sys.stderr)
        reader.verify()
        write_model(reader, folder, dtype=dtype, shard_bytes=config.shard_bytes)
        if config.proof:
            task = Task(checkpoint=reader.path, folder=folder, dtype=dtype, limit=config.proof_sequences)
            report = prove_in_child(task)
        else:
            report = write_report(reader, folder, dtype=dtype, findings=None)
        (folder / "README.md").write_text(model_card(reader, report), encoding="utf-8")
    print("\n".join([*summary(report), f"exported to {out}"]))
    return 0


def default_folder(reader: CheckpointReader) -> Path:
    """Where an export goes when no folder is named: below the working folder, one for each run and step."""
    return Path("exported") / f"{reader.config.run.name.replace('/', '-')}-{reader.path.name}"


def summary(report: dict[str, Any]) -> list[str]:
    """What the proof found, a line a check."""
    if not report["proof"]:
        return ["not proved (proof=false)"]
    proof = report["proof"]
    logits, loss = proof["logits"], proof["held_out_loss"]
    lines = [
        f"keys        all of {proof['weights']['tensors']} tensors, bit-equal to the checkpoint in {report['dtype']}",
        f"logits      differ by at most {logits['max_abs_difference']:.2g} over {logits['positions']} positions, "
        f"{logits['argmax_equal']} likeliest tokens equal",
        f"generation  equal for {proof['generation']['prompts']} prompts",
    ]
    if "not_measured" in loss:
        return [*lines, f"loss        not measured: {loss['not_measured']}"]
    figures = f"{loss['longhaul']:.6f} in Longhaul, {loss['transformers']:.6f} in transformers"
    return [*lines, f"loss        {figures}, over {loss['targets']:,} held-out tokens"]
