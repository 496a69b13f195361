"""Import: a Hugging Face model folder becomes a checkpoint, proved before it appears."""

from __future__ import annotations

import sys
from pathlib import Path

from train.checkpoint.reader import CheckpointReader
from train.config.hf_import import ImportConfig
from train.config.imported import Origin
from train.convert.hf_import import Found, fetch, inspect_folder, plan_checkpoint, take_tokenizer, write_checkpoint
from train.convert.prove import Task, check_can_prove, prove_in_child
from train.convert.publication import REPORT, Publication, check_apart, check_room
from train.convert.report import source_name, summary, write_report
from train.convert.shards import missing_bytes


def run(config: ImportConfig) -> int:
    """Write, prove and publish; tells what was found. Returns the exit code.

    Raises UserError, and publishes nothing, when the folder holds what our decoder does not have, or the proof fails.
    """
    if config.proof:
        check_can_prove()
    folder, commit = fetch(config.hf, revision=config.revision, format=config.weights)
    found = inspect_folder(folder, config.weights)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    out = Path(config.out) if config.out is not None else default_folder(config.hf)
    plan = plan_checkpoint(found, shard_bytes=config.shard_bytes)
    check_apart(out, folder)
    tokenizer = folder if config.tokenizer is None else Path(config.tokenizer).expanduser()
    origin = Origin(source=source_name(config.hf), revision=commit, dtype=found.dtype)
    with Publication(out, "checkpoint", overwrite=config.overwrite, source=identity(found, config)) as partial:
        check_room(partial, missing_bytes(partial, plan))
        take_tokenizer(tokenizer, partial / "tokenizer", found.model)
        print(f"{config.hf}: writing {found.dtype} weights of a {found.model.family}", file=sys.stderr)
        write_checkpoint(found, plan, partial, origin=origin)
        reader = CheckpointReader(partial)
        if config.proof:
            task = Task(
                checkpoint=partial,
                folder=folder,
                dtype="stored",
                report=partial / REPORT,
                tokenizer=tokenizer,
                weights=config.weights,
                made="checkpoint",
            )
            report = prove_in_child(task)
        else:
            report = write_report(reader, partial / REPORT, format="checkpoint", dtype=found.dtype, findings=None)
    use = f"evaluate checkpoint={out} task=classification" if found.model.labels else f"generate checkpoint={out} prompt=..."
    print("\n".join([*summary(report), f"imported to {out}; next: longhaul {use}"]))
    return 0


def default_folder(source: str) -> Path:
    """Where an import goes when no folder is named: below the working folder, by the model's name."""
    return Path("imported") / source_name(source).rpartition("/")[2]


def identity(found: Found, config: ImportConfig) -> dict[str, object]:
    """What the weight files follow from: an interrupted import of the same goes on, of another begins anew."""
    facts = {str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns] for path in found.files.files}
    settings = found.folder / "config.json"
    return {"files": facts, "settings": settings.read_text(encoding="utf-8"), "shard_bytes": config.shard_bytes}
