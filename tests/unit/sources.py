"""The sources of this repository, as the architecture tests read them: each file once."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from conf.compose import CONF_FOLDER

REPOSITORY = CONF_FOLDER.parent
PACKAGES = ("conf", "data_pipeline", "train", "slurm", "tools")


class Function(NamedTuple):
    """A function or method: dotted name, definition, whether its first parameter is the object or the class."""

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    is_method: bool

    @property
    def positional(self) -> int:
        return len(self.node.args.posonlyargs) + len(self.node.args.args) - self.is_method


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        return tuple(ast.walk(self.tree))

    @cached_property
    def functions(self) -> tuple[Function, ...]:
        return tuple(_functions(self.tree, self.name))

    @property
    def is_test(self) -> bool:
        return is_below(self.name, "tests")

    @cached_property
    def imports(self) -> dict[str, int]:
        """Dotted names of everything it imports, wherever in the file, and the first line of each."""
        found: dict[str, int] = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                imported = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                # `from train.model import cost` means the module train.model.cost
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                imported = {name for name in inner if name in names()} or {node.module}
            else:
                continue
            for name in imported:
                found[name] = min(node.lineno, found.get(name, node.lineno))
        return found


@cache
def modules() -> tuple[Module, ...]:
    """All of ours, the tests among them, parsed."""
    paths = [path for package in (*PACKAGES, "tests") for path in sorted((REPOSITORY / package).rglob("*.py"))]
    found = tuple(Module(name=name_of(path), path=path, text=path.read_text(encoding="utf-8")) for path in paths)
    # A million nodes that all stay make the collector go through them again and again: 2.4 s of parsing, 0.9 s without it.
    gc.disable()
    try:
        assert all(module.tree for module in found)
    finally:
        gc.enable()
    return found


@cache
def names() -> frozenset[str]:
    return frozenset(module.name for module in modules())


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _functions(tree: ast.AST, prefix: str) -> Iterator[Function]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.expr):
            continue  # holds none: three quarters of the nodes
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function:
            static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
            yield Function(f"{prefix}.{node.name}", node, isinstance(tree, ast.ClassDef) and not static)
        named = isinstance(node, ast.ClassDef) or is_function
        yield from _functions(node, f"{prefix}.{node.name}" if named else prefix)
