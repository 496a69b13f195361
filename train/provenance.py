"""Which source and which packages a figure comes from, and which must not compute one. Torch-free; imports none of them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from conf.errors import UserError

OLDEST_DEEPSPEED = (0, 19, 8)
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


def check_deepspeed() -> None:
    """Raises UserError where DeepSpeed is missing or of a version that trains otherwise than it is told, with no error."""
    way_out = 'pip install "deepspeed>=' + ".".join(str(part) for part in OLDEST_DEEPSPEED) + ',<0.20"'
    try:
        found = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise UserError(f"deepspeed is not installed in this environment; {way_out}") from None
    if tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < OLDEST_DEEPSPEED:
        raise UserError(
            f"deepspeed={found}: must be at least 0.19.8: earlier versions update Muon's matrices as plain SGD would, and up "
            f"to 0.19.3 wrong gradients were reported under parallel.zero=2, both without an error; {way_out}"
        )
