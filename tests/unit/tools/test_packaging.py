"""A built wheel carries the packages, the configuration groups and the command."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.timeouts import scaled

ROOT = Path(__file__).resolve().parents[3]
PARTS = ("conf", "train", "data_pipeline", "tools", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def test_wheel_holds_what_the_command_needs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in PARTS:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=scaled(120))
    names = set(zipfile.ZipFile(next(tmp_path.glob("longhaul-*.whl"))).namelist())
    yamls = {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("train", "data_pipeline", "tools", "conf")
        for path in (ROOT / package).rglob("*.py")
    }
    assert yamls and yamls <= names
    assert modules <= names
    assert any(name.endswith("entry_points.txt") for name in names)
    assert not any(name.startswith("tests/") for name in names)
