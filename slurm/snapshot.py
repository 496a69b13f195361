"""What a job needs of this moment, kept in the run's folder: the source, the environment, the user's own configuration."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import conf
from conf.errors import UserError
from train.provenance import COMMIT_FILE, git_commit

PACKAGES = ("conf", "data_pipeline", "slurm", "tools", "train")
SUFFIXES = frozenset({".py", ".yaml", ".j2", ".sh", ".txt"})
CODE, OWN_CONFIG, ENVIRONMENT, CHANGES = "code", "config-dir", "environment.txt", "changes.diff"


def take_snapshot(folder: Path, config_dir: str | None) -> None:
    """Put source, environment and the user's own configuration into `folder`; those of a submission before are replaced.

    Raises UserError when it cannot be written.
    """
    source = Path(conf.__file__).resolve().parents[1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f".{CODE}"
        shutil.rmtree(fresh, ignore_errors=True)
        for package in PACKAGES:
            for path in sorted((source / package).rglob("*")):
                if path.suffix in SUFFIXES and path.is_file():
                    copy = fresh / path.relative_to(source)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
        (fresh / COMMIT_FILE).write_text(git_commit() or "", encoding="utf-8")
        _replace(fresh, folder / CODE)
        if config_dir is not None:
            own = folder / f".{OWN_CONFIG}"
            shutil.rmtree(own, ignore_errors=True)
            shutil.copytree(config_dir, own)
            _replace(own, folder / OWN_CONFIG)
        (folder / ENVIRONMENT).write_text(_environment(), encoding="utf-8")
        (folder / CHANGES).write_text(_git(source, "diff", "HEAD"), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written ({error.strerror})") from None


def _replace(fresh: Path, place: Path) -> None:
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    fresh.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _environment() -> str:
    """The interpreter and every package, as pip would install them."""
    packages = sorted({f"{item.name}=={item.version}" for item in metadata.distributions() if item.name}, key=str.lower)
    return "\n".join([f"# Python {platform.python_version()} at {sys.executable}, {platform.platform()}", *packages, ""])


def _git(source: Path, *words: str) -> str:
    """Output of git; empty outside a repository."""
    try:
        done = subprocess.run(["git", "-C", str(source), *words], capture_output=True, text=True, timeout=20, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
