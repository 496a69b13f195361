"""Which of the project's requirements the running interpreter does not satisfy: `python tools/requirements.py [EXTRA]`.

Imports nothing but the standard library and `packaging`, so that any environment can be asked. Exit code 1 when something is
missing, each on a line of its own.
"""

from __future__ import annotations

import importlib.metadata
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

try:
    from packaging.requirements import Requirement
except ImportError:  # every environment that satisfies us has it
    Requirement = None

LEAST_PYTHON = (3, 11)


def requirements(extra: str = "") -> list[str]:
    """What setup.py asks for, with those of `extra`; it is run with a stand-in for setuptools, which may not be there."""
    told: dict = {}
    stand_in = ModuleType("setuptools")
    stand_in.setup, stand_in.find_packages = told.update, lambda **_: []
    before = sys.modules.get("setuptools")
    sys.modules["setuptools"] = stand_in
    try:
        runpy.run_path(str(Path(__file__).parents[1] / "setup.py"))
    finally:
        if before is None:
            del sys.modules["setuptools"]
        else:
            sys.modules["setuptools"] = before
    return [*told["install_requires"], *(told["extras_require"][extra] if extra else [])]


def unsatisfied(wanted: Sequence[str], version_of: Callable[[str], str] = importlib.metadata.version) -> list[str]:
    """A line for each requirement that is not met: what is wanted, and what there is."""
    if Requirement is None:
        return ["packaging: not installed, nor anything that needs it"]
    lines = []
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            found = version_of(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{requirement}: not installed")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            lines.append(f"{requirement}: {found} is installed")
    return lines


def main(extra: str = "") -> int:
    """Print what is missing, and how to get it."""
    if sys.version_info < LEAST_PYTHON:
        print(f"Python {sys.version.split()[0]} at {sys.prefix}: Longhaul needs 3.11 or later")
        return 1
    lines = unsatisfied(requirements(extra))
    if lines:
        print(f"{sys.prefix}: does not satisfy what this project needs:", *(f"  {line}" for line in lines), sep="\n")
        print(f"install it there ({sys.executable} -m pip install -e .), or leave VENV out: .venv is then made here")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
