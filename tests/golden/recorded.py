"""The recorded runs of this folder: which there are, a copy that may be written to, what they did next when they were made."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
NAMES = tuple(sorted(path.parent.name for path in FOLDER.glob("runs/*/expected.json")))


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a run did after its last checkpoint, by the code that made it: records without what a clock or a machine decides."""

    train: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    """Of one step those of all validation sets, in the order in which they were written."""


def expected(name: str) -> Expected:
    content = json.loads((FOLDER / "runs" / name / "expected.json").read_text(encoding="utf-8"))
    return Expected(train=content["train"], evaluation=content["evaluation"])


def copied(name: str, place: Path) -> Path:
    """The folder of a run below `place`, beside the corpora and rows, as the relative paths in its settings have them.

    The checkpoint that a fine-tuning began with is not there: a resume does not need it.
    """
    shutil.copytree(FOLDER / "data", place / "data")
    return Path(shutil.copytree(FOLDER / "runs" / name, place / "runs" / name, symlinks=True))
