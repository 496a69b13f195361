"""The settings that lie in a checkpoint: those of the run that wrote it, or of the import. Torch-free."""

from __future__ import annotations

from pathlib import Path

from conf.compose import read_config
from train.checkpoint.manifest import CheckpointError, Manifest
from train.config.imported import ImportedConfig
from train.config.runs import RUNS
from train.config.settings import RunSettings

SCHEMAS: dict[str, type[RunSettings] | type[ImportedConfig]] = {**RUNS, "import": ImportedConfig}


def read_settings(folder: Path, manifest: Manifest) -> RunSettings | ImportedConfig:
    """The resolved settings of the checkpoint in `folder`; all kinds have a `model`.

    Raises CheckpointError when another verb wrote it, and UserError when they cannot be read.
    """
    if manifest.written_by not in SCHEMAS:
        raise CheckpointError(f"{folder}: was written by `{manifest.written_by}`, which this program does not know")
    return read_config(SCHEMAS[manifest.written_by], folder / "config.yaml")
