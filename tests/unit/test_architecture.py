"""The rules of the design that a machine can check: who imports whom, who owns what, how large things are."""

from __future__ import annotations

import ast
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from conf.schema import dataclass_in, element_dataclass
from data_pipeline.config import PrepareConfig
from tests.unit.design import ENVIRONMENT, ONLY, ORDER, OWNERS, TORCH_FREE
from tests.unit.sources import PACKAGES, REPOSITORY, Module, functions, is_below, modules, name_of, names
from train.config.evaluation import EvaluationConfig
from train.config.export import ExportConfig
from train.config.generate import GenerateConfig
from train.config.hf_import import ImportConfig
from train.config.imported import ImportedConfig
from train.config.pretrain import PretrainConfig

FORBIDDEN_NAMES = {"tokenize", "utils", "util", "common", "helpers", "helper", "misc"}  # tokenize shadows Python's own
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 80
MOST_PARAMETERS = 8
MOST_POSITIONAL = 4
POSITIONAL_EXCEPTIONS = {
    "data_pipeline.prepare._publish": "the last of the steps that share their five objects",
    "train.model.heads._ChunkedLoss.forward": "an autograd function is called with positions only",
}


def entry_of(name: str) -> str:
    """The entry of ORDER that a module belongs to."""
    fitting = [entry for entry in ORDER if is_below(name, entry)]
    assert fitting, f"{name} has no place in ORDER; enter it where it belongs"
    return max(fitting, key=len)


def each_module() -> Iterator[pytest.param]:
    return (pytest.param(module, id=module.name) for module in modules())


@pytest.mark.parametrize("module", [module for module in each_module() if module.id != "train"])
def test_imports_go_one_way(module: Module) -> None:
    own = entry_of(module.name)
    for imported in module.imports:
        if imported.split(".")[0] not in PACKAGES:
            continue
        other = entry_of(imported)
        assert ORDER.index(other) <= ORDER.index(own), f"{module.name} imports {imported}, which stands above it"
        for package, allowed in ONLY.items():
            if is_below(module.name, package):
                fits = any(is_below(imported, name) for name in allowed)
                assert fits, f"{module.name} imports {imported}; {package} may import {', '.join(allowed)}"


def test_order_has_no_stale_entry() -> None:
    planned = {"slurm"}  # part of the design, not of every tree
    for entry in {*ORDER, *ONLY} - planned:
        assert any(is_below(name, entry) for name in names()), f"{entry} does not exist"


@pytest.mark.parametrize("module", each_module())
def test_heavy_libraries_have_their_owners(module: Module) -> None:
    for imported in module.imports:
        library = imported.split(".")[0]
        if library in PACKAGES or library in sys.stdlib_module_names:
            continue
        assert library in OWNERS, f"{module.name} imports {library}, which has no owner; enter one"
        owners = OWNERS[library]
        fits = not owners or any(is_below(module.name, owner) for owner in owners)
        assert fits, f"{module.name} imports {library}, which belongs to {', '.join(owners)}"


def test_what_must_be_quick_stays_free_of_torch() -> None:
    heavy = ("torch", "deepspeed", "megatron", "transformers", "tokenizers", "wandb", "datasets", "safetensors")
    code = f"""
import importlib, sys
for module in {TORCH_FREE}:
    importlib.import_module(module)
    if found := [name for name in {heavy} if name in sys.modules]:
        sys.exit(f"importing {{module}} imports {{', '.join(found)}}")
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


# --- sizes


@pytest.mark.parametrize(
    "path", sorted(path for package in (*PACKAGES, "tests") for path in (REPOSITORY / package).rglob("*.py")), ids=name_of
)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MOST_LINES_OF_A_FILE, f"{path} has {lines} lines; make it a folder"
    for name, function, is_method in functions(ast.parse(text), name_of(path)):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= MOST_LINES_OF_A_FUNCTION, f"{name} has {length} lines"
        positional = len(function.args.posonlyargs) + len(function.args.args) - is_method
        total = positional + len(function.args.kwonlyargs)
        assert total <= MOST_PARAMETERS, f"{name} has {total} parameters"
        if name not in POSITIONAL_EXCEPTIONS and not path.is_relative_to(REPOSITORY / "tests"):
            assert positional <= MOST_POSITIONAL, f"{name} has {positional} positional parameters; make the later keyword-only"


def test_exceptions_are_needed() -> None:
    found = {
        name
        for module in modules()
        for name, function, is_method in functions(module.tree, module.name)
        if len(function.args.posonlyargs) + len(function.args.args) - is_method > MOST_POSITIONAL
    }
    assert found == set(POSITIONAL_EXCEPTIONS)


# --- the configuration


def sections(schema: type) -> Iterator[type]:
    """`schema` and every dataclass below it."""
    import typing

    yield schema
    for hint in typing.get_type_hints(schema).values():
        inner = dataclass_in(hint) or element_dataclass(hint)
        if inner:
            yield from sections(inner)


SECTIONS = sorted(
    {
        section
        for root in (
            PretrainConfig,
            PrepareConfig,
            GenerateConfig,
            ExportConfig,
            ImportConfig,
            ImportedConfig,
            EvaluationConfig,
        )
        for section in sections(root)
    },
    key=lambda section: section.__name__,
)


@cache
def names_read() -> frozenset[str]:
    """Attribute names that the code reads outside the configuration's own checks."""
    return frozenset(name for module in modules() for name in _names_read(module.tree))


def _names_read(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef) and (node.name == "__post_init__" or node.name.endswith("_problems")):
        return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield node.attr
    for child in ast.iter_child_nodes(node):
        yield from _names_read(child)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_is_read(section: type) -> None:
    """By name, so a namesake can hide a field that is not; a field whose name is nowhere is certainly dead."""
    unread = [name for name in section.__dataclass_fields__ if name not in names_read()]
    assert not unread, f"{section.__name__}: nothing reads {', '.join(unread)}"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_sections_are_frozen_keyword_only_and_documented(section: type) -> None:
    from tools.help import field_documents

    assert section.__dataclass_params__.frozen and all(f.kw_only for f in section.__dataclass_fields__.values())
    undocumented = set(section.__dataclass_fields__) - set(field_documents(section))
    assert not undocumented, f"{section.__name__}: no line under {', '.join(sorted(undocumented))}"


# --- what must not be there


@pytest.mark.parametrize("module", each_module())
def test_environment_is_read_in_few_places(module: Module) -> None:
    assert set(environment_names(module.tree)) <= ENVIRONMENT.get(module.name, set()), module.name


def test_environment_table_has_no_stale_entry() -> None:
    for module in modules():
        expected = ENVIRONMENT.get(module.name)
        if expected is not None:
            assert set(environment_names(module.tree)) == expected, module.name


def environment_names(tree: ast.AST) -> Iterator[str]:
    """Names of the variables that are read or set; "*" where the environment is used as a whole."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            if node.attr in ("getenv", "putenv"):
                yield "os.getenv: use os.environ"
            if node.attr != "environ":
                continue
            parent = parents[node]
            call = parents.get(parents[node])
            if isinstance(parent, ast.Subscript) and isinstance(parent.slice, ast.Constant):
                yield parent.slice.value
            elif isinstance(parent, ast.Attribute) and isinstance(call, ast.Call) and call.args:
                yield call.args[0].value if isinstance(call.args[0], ast.Constant) else "*"
            else:
                yield "*"


@pytest.mark.parametrize("module", each_module())
def test_nothing_from_outside_is_unpickled(module: Module) -> None:
    # One reads foreign pickled weights, when asked to, by torch's loader of nothing but tensors; it names that loader's error.
    restricted = module.name == "train.convert.weights"
    unpicklers = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"} - ({"pickle"} if restricted else set())
    assert not unpicklers & {name.split(".")[0] for name in module.imports}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"), f"{module.path}: {called}"
            assert called != "torch.load" or (restricted and keywords.get("weights_only") == "True"), module.path
            assert called not in ("np.load", "numpy.load") or keywords.get("allow_pickle") == "False", module.path
            assert keywords.get("trust_remote_code", "False") == "False", f"{module.path}:{node.lineno}"


@pytest.mark.parametrize("module", each_module())
def test_broad_excepts_say_why(module: Module) -> None:
    """In a comment before the `try` or at the handler; not needed where the last thing it does is to raise again."""
    lines = ["", *module.path.read_text(encoding="utf-8").splitlines()]
    for block in (node for node in ast.walk(module.tree) if isinstance(node, ast.Try)):
        for handler in block.handlers:
            caught = "everything" if handler.type is None else ast.unparse(handler.type)
            last = handler.body[-1]
            if caught not in ("everything", "Exception", "BaseException") or isinstance(last, ast.Raise) and last.exc is None:
                continue
            near = [lines[block.lineno - 1], *lines[handler.lineno - 1 : handler.body[0].lineno]]
            assert any("#" in line for line in near), f"{module.path}:{handler.lineno}: catches {caught} without a reason"


@pytest.mark.parametrize("module", each_module())
def test_every_file_says_what_it_owns(module: Module) -> None:
    assert ast.get_docstring(module.tree), f"{module.path} has no docstring"


def test_file_names() -> None:
    bad = [name for name in names() if set(name.split(".")) & FORBIDDEN_NAMES]
    assert not bad, f"{bad}: a file is named after what it owns"


def test_nothing_is_left_to_do() -> None:
    marks = {"TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"}
    for package in (*PACKAGES, "tests"):
        for path in (REPOSITORY / package).rglob("*.py"):
            with path.open("rb") as file:
                for token in tokenize.tokenize(file.readline):
                    if token.type == tokenize.COMMENT:
                        assert not marks & set(token.string.replace(":", " ").split()), f"{path}:{token.start[0]}"
