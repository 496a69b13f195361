"""Which source and which packages a figure comes from. Torch-free; imports none of the packages it names."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

VERSIONS_OF = ("torch", "deepspeed", "megatron-core", "transformers", "tokenizers", "numpy")
COMMIT_FILE = "COMMIT"  # beside the packages of a copy of the source


def git_commit() -> str | None:
    """Commit of the source tree that runs, with a mark when it has changes; None outside a repository.

    A copy that was made for a job knows it from the file that came with it: it may lie within another repository.
    """
    source = Path(__file__).resolve().parent
    note = source.parent / COMMIT_FILE
    if note.exists():
        return note.read_text(encoding="utf-8").strip() or None
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions of the packages that decide the numbers, and of `more`, without importing them."""
    found = {}
    for name in (*VERSIONS_OF, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
