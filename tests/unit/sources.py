"""The sources of this repository, as the architecture tests read them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from conf.compose import CONF_FOLDER

REPOSITORY = CONF_FOLDER.parent
PACKAGES = ("conf", "data_pipeline", "train", "slurm", "tools")


@dataclass(frozen=True)
class Module:
    """One source file of ours."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def imports(self) -> set[str]:
        """Dotted names of everything it imports, wherever in the file."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{self.path}:{node.lineno}: a relative import"
                # `from train.model import cost` means the module train.model.cost
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name for name in inner if name in names()} or {node.module}
        return found


@cache
def modules() -> tuple[Module, ...]:
    """All modules outside tests."""
    paths = [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]
    return tuple(
        Module(name=name_of(path), path=path, tree=ast.parse(path.read_text(encoding="utf-8")))
        for path in paths
        if "__pycache__" not in path.parts
    )


@cache
def names() -> frozenset[str]:
    return frozenset(name_of(path) for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """(dotted name, function, whether its first parameter is the object or the class)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
            yield f"{prefix}.{node.name}", node, isinstance(tree, ast.ClassDef) and not static
        named = isinstance(node, ast.ClassDef | ast.FunctionDef)
        yield from functions(node, f"{prefix}.{node.name}" if named else prefix)
