"""Export: a checkpoint becomes a Hugging Face model folder, proved before it appears; or its adapters one of PEFT."""

from __future__ import annotations

import sys
from pathlib import Path

from conf.errors import UserError
from train.checkpoint.manifest import MANIFEST, file_facts, resolve_checkpoint
from train.checkpoint.reader import CheckpointReader
from train.config.export import ExportConfig
from train.config.imported import ImportedConfig
from train.convert.card import adapter_card, model_card
from train.convert.card_scores import evaluations_of
from train.convert.hf_config import check_expressible
from train.convert.hf_export import copy_tokenizer, plan_weights, resolve_export_dtype, write_model
from train.convert.peft_export import check_adapted, write_adapter
from train.convert.prove import Task, check_can_prove, has_peft, prove_in_child
from train.convert.publication import REPORT, Publication, check_apart, check_room
from train.convert.report import NOT_ASKED, summary, write_report
from train.convert.shards import missing_bytes
from train.model.cost import num_parameters

PEFT_IS_MISSING = "peft is not installed"


def run(config: ExportConfig) -> int:
    """Write, prove and publish; tells what was found. Returns the exit code.

    Raises UserError, and publishes nothing, when the checkpoint cannot be trusted or expressed, or the proof fails.
    """
    if config.proof:
        check_can_prove()
    if config.adapter:
        return _export_adapter(config)
    reader = CheckpointReader(resolve_checkpoint(config.checkpoint))
    check_expressible(reader.model)  # before its files are read, which takes long
    evaluations = evaluations_of(reader)
    dtype = resolve_export_dtype(config.dtype, reader)
    plan = plan_weights(reader, dtype, shard_bytes=config.shard_bytes)
    out = Path(config.out) if config.out is not None else default_folder(reader)
    check_apart(out, reader.path)
    source = {"manifest": file_facts(reader.path / MANIFEST).sha256, "dtype": dtype, "shard_bytes": config.shard_bytes}
    with Publication(out, "hf", overwrite=config.overwrite, source=source) as folder:
        print(f"{reader.path.name}: checking its files, then writing {dtype} weights", file=sys.stderr)
        check_room(folder, missing_bytes(folder, plan))
        reader.verify()
        write_model(reader, plan, folder, dtype=dtype)
        if config.proof:
            task = Task(
                checkpoint=reader.path, folder=folder, dtype=dtype, report=folder / REPORT, limit=config.proof_sequences
            )
            report = prove_in_child(task)
        else:
            report = write_report(reader, folder / REPORT, format="hf", dtype=dtype, findings=None)
        (folder / "README.md").write_text(model_card(reader, report, evaluations), encoding="utf-8")
    print("\n".join([*summary(report), f"exported to {out}"]))
    return 0


def _export_adapter(config: ExportConfig) -> int:
    reader = CheckpointReader(resolve_checkpoint(config.checkpoint))
    check_adapted(reader)
    check_expressible(reader.model)
    base_model = config.base_model or _imported_from(reader)
    evaluations = evaluations_of(reader)
    usual = default_folder(reader)
    out = usual.with_name(f"{usual.name}-adapter") if config.out is None else Path(config.out)
    check_apart(out, reader.path)
    source = {"manifest": file_facts(reader.path / MANIFEST).sha256, "base_model": base_model}
    proves = config.proof and has_peft()
    with Publication(out, "adapter", overwrite=config.overwrite, source=source) as folder:
        print(f"{reader.path.name}: checking its files, then writing its adapters", file=sys.stderr)
        reader.verify()
        write_adapter(reader, folder, base_model=base_model)
        copy_tokenizer(reader.tokenizer_folder, folder)
        if proves:
            check_room(folder, 4 * num_parameters(reader.model))  # the base, for a while
            task = Task(checkpoint=reader.path, folder=folder, dtype="fp32", report=folder / REPORT, made="adapter")
            report = prove_in_child(task)
        else:
            why = PEFT_IS_MISSING if config.proof else NOT_ASKED
            report = write_report(reader, folder / REPORT, format="adapter", dtype="fp32", findings=None, why_none=why)
        (folder / "README.md").write_text(adapter_card(reader, base_model, report, evaluations), encoding="utf-8")
    print("\n".join([*summary(report), f"base        {base_model}: what PEFT loads below them", f"exported to {out}"]))
    return 0


def _imported_from(reader: CheckpointReader) -> str:
    """The name on the hub of the model that the adapters stand beside. Raises UserError when it has none."""
    assert reader.base is not None, "adapters stand beside a base"
    settings = reader.base.settings
    if isinstance(settings, ImportedConfig) and settings.origin.revision is not None:
        return settings.origin.source
    raise UserError(
        f"base_model=null: {reader.base.path} is of no name on the hub; give base_model=NAME, or a folder: longhaul export "
        f"checkpoint={reader.base.path} makes one"
    )


def default_folder(reader: CheckpointReader) -> Path:
    """Where an export goes when no folder is named: below the working folder, one for each run and step, or import."""
    if isinstance(reader.settings, ImportedConfig):
        return Path("exported") / reader.path.name
    return Path("exported") / f"{reader.settings.run.name.replace('/', '-')}-{reader.path.name}"
