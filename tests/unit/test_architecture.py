"""The rules of the design that a machine can check: who imports whom, who owns what, how large things are.

A rule is a function from modules to its offences, with a source that breaks it and the lines that do. The tables are in
`tests.unit.design`, the reader of the sources in `tests.unit.sources`.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from conf.schema import dataclass_in, element_dataclass
from data_pipeline.config import PrepareConfig
from tests.timeouts import scaled
from tests.unit import design
from tests.unit.design import ENVIRONMENT, ONLY, ORDER, OWNERS, TORCH_FREE
from tests.unit.sources import PACKAGES, REPOSITORY, Module, is_below, modules
from tools.help import field_documents
from train.config.evaluation import EvaluationConfig
from train.config.export import ExportConfig
from train.config.generate import GenerateConfig
from train.config.hf_import import ImportConfig
from train.config.imported import ImportedConfig
from train.config.pretrain import PretrainConfig

FORBIDDEN_NAMES = {"tokenize", "utils", "util", "common", "helpers", "helper", "misc"}  # tokenize shadows Python's own
MOST_LINES_OF_A_FILE = 600
MOST_LINES_OF_A_FUNCTION = 80
MOST_PARAMETERS = 8
MOST_POSITIONAL = 4
POSITIONAL_EXCEPTIONS = {
    "data_pipeline.prepare._publish": "the last of the steps that share their five objects",
    "train.model.float8._Product.forward": "an autograd function is called with positions only",
    "train.model.heads._ChunkedLoss.forward": "an autograd function is called with positions only",
}
MARKS = {"TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"}


@dataclass(frozen=True)
class Offence:
    """A line that breaks a rule, printed so that an editor can jump to it."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        path = self.path.relative_to(REPOSITORY) if self.path.is_relative_to(REPOSITORY) else self.path
        return f"{path}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Rule:
    """`check`, a module that breaks it, and the lines of that module that do."""

    check: Callable[[Sequence[Module]], Iterator[Offence]]
    broken: Module
    lines: tuple[int, ...]


RULES: dict[str, Rule] = {}


def rule(source: str, *lines: int, name: str = "train.model.invented") -> Callable:
    """Enters a function as a rule; `source`, as a module of that name, breaks it in `lines`."""
    path = REPOSITORY / f"{name.replace('.', '/')}.py"
    broken = Module(name=name, path=path, text=inspect.cleandoc(source))

    def entered(check: Callable) -> Callable:
        RULES[check.__name__] = Rule(check=check, broken=broken, lines=lines)
        return check

    return entered


def assert_none(broken_rule: str, offences: Iterable[Offence]) -> None:
    listed = sorted(offences, key=lambda offence: (offence.path, offence.line))
    assert not listed, f"{broken_rule}: {len(listed)} offences\n" + "\n".join(f"  {offence}" for offence in listed)


# --- who imports whom


def entry_of(name: str) -> str | None:
    """The entry of ORDER that a module belongs to."""
    return max((entry for entry in ORDER if is_below(name, entry)), key=len, default=None)


def imports_of_ours(modules: Sequence[Module]) -> Iterator[tuple[Module, str, int]]:
    """(module, what it imports of ours, line); `train` itself is the one package without a place in ORDER."""
    for module in modules:
        if not module.is_test and module.name != "train":
            for imported, line in module.imports.items():
                if imported.split(".")[0] in PACKAGES:
                    yield module, imported, line


@rule(
    """
    from train.model import cost
    import train.launch
    from slurm import submit
    import train.unheard_of
    """,
    *(2, 3, 4),
)
def imports_go_one_way(modules: Sequence[Module]) -> Iterator[Offence]:
    for module, imported, line in imports_of_ours(modules):
        own, other = entry_of(module.name), entry_of(imported)
        if own is None or other is None:
            homeless = module.name if own is None else imported
            yield Offence(module.path, line, f"{homeless} has no place in ORDER; enter it where it belongs")
        elif ORDER.index(other) > ORDER.index(own):
            yield Offence(module.path, line, f"{module.name} imports {imported}, which stands above it")


@rule(
    """
    from conf.errors import UserError
    from conf import compose
    """,
    2,
    name="train.supervisor.invented",
)
def packages_import_only_what_they_may(modules: Sequence[Module]) -> Iterator[Offence]:
    for module, imported, line in imports_of_ours(modules):
        for package, allowed in ONLY.items():
            if is_below(module.name, package) and not any(is_below(imported, name) for name in allowed):
                yield Offence(module.path, line, f"imports {imported}; {package} may import {', '.join(allowed)}")


@rule(
    """
    from . import cost
    from train.model import cost
    from ..config import model
    """,
    *(1, 3),
)
def imports_are_absolute(modules: Sequence[Module]) -> Iterator[Offence]:
    for module in modules:
        for node in module.nodes if re.search(r"from\s*\.", module.text) else ():
            if isinstance(node, ast.ImportFrom) and node.level:
                yield Offence(module.path, node.lineno, "a relative import")


@rule(
    """
    import torch, json
    import deepspeed.comm
    def late():
        import pandas
    """,
    *(2, 4),
)
def heavy_libraries_have_their_owners(modules: Sequence[Module]) -> Iterator[Offence]:
    for module in modules:
        for imported, line in () if module.is_test else module.imports.items():
            library = imported.split(".")[0]
            if library in PACKAGES or library in sys.stdlib_module_names:
                continue
            if library not in OWNERS:
                yield Offence(module.path, line, f"imports {library}, which has no owner; enter one")
            elif OWNERS[library] and not any(is_below(module.name, owner) for owner in OWNERS[library]):
                yield Offence(module.path, line, f"imports {library}, which belongs to {', '.join(OWNERS[library])}")


# Runs where nothing is imported yet. A heavy library is refused, so that every module that asks for one is found.
FIND_HEAVY_IMPORTS = """
import importlib, sys
heavy, root, names = eval(sys.argv[1])

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in heavy:
            frame = sys._getframe(1)
            while frame.f_back and not frame.f_code.co_filename.startswith(root):
                frame = frame.f_back
            print(frame.f_code.co_filename, frame.f_lineno, name, imported, sep="|")
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Refusal())
for imported in names:
    try:
        importlib.import_module(imported)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] not in heavy:
            raise
"""


def heavy_imports(names: Sequence[str]) -> Iterator[Offence]:
    """Where one of these modules, or one that it imports, loads a heavy library; in a process of its own."""
    heavy = ("torch", "deepspeed", "megatron", "transformers", "tokenizers", "wandb", "datasets", "safetensors")
    given = repr((heavy, f"{REPOSITORY}/", tuple(names)))
    command = [sys.executable, "-P", "-c", FIND_HEAVY_IMPORTS, given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=scaled(60))
    assert done.returncode == 0, done.stderr
    for path, line, library, imported in (text.split("|") for text in done.stdout.splitlines()):
        yield Offence(Path(path), int(line), f"imports {library} when {imported} is imported")


def test_what_must_be_quick_stays_free_of_torch() -> None:
    assert_none("free of torch", heavy_imports(TORCH_FREE))


def test_heavy_imports_are_found() -> None:
    found = {str(offence) for offence in heavy_imports(("train.host", "train.model.float8", "train.model.recompute"))}
    assert {text.split(": ")[1] for text in found} == {
        f"imports torch when train.model.{name} is imported" for name in ("float8", "recompute")
    }
    assert all(text.startswith("train/model/") for text in found)


# --- sizes


@rule("x = 1\n" * (MOST_LINES_OF_A_FILE + 1), 1)
def files_are_not_too_long(modules: Sequence[Module]) -> Iterator[Offence]:
    for module in modules:
        lines = len(module.text.splitlines())
        if lines > MOST_LINES_OF_A_FILE:
            yield Offence(module.path, 1, f"{lines} lines, at most {MOST_LINES_OF_A_FILE}: is it one subject?")


@rule("def short(): ...\ndef long():\n" + "    x = 1\n" * MOST_LINES_OF_A_FUNCTION, 2)
def functions_are_not_too_long(modules: Sequence[Module]) -> Iterator[Offence]:
    for module in modules:
        for name, node, _ in module.functions:
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MOST_LINES_OF_A_FUNCTION:
                yield Offence(module.path, node.lineno, f"{name} has {length} lines, at most {MOST_LINES_OF_A_FUNCTION}")


@rule(
    """
    class A:
        def fits(self, a, b, c, d, *, e, f, g, h): ...
        def not_this(self, a, b, c, d, *, e, f, g, h, i): ...
    """,
    3,
)
def functions_have_few_parameters(modules: Sequence[Module]) -> Iterator[Offence]:
    for module in modules:
        for function in module.functions:
            total = function.positional + len(function.node.args.kwonlyargs)
            if total > MOST_PARAMETERS:
                text = f"{function.name} has {total} parameters, at most {MOST_PARAMETERS}"
                yield Offence(module.path, function.node.lineno, text)


@rule(
    """
    class A:
        def fits(self, a, b, c, d): ...
        def not_this(self, a, b, /, c, d, e): ...
        @staticmethod
        def nor_this(a, b, c, d, e): ...
    """,
    *(3, 5),
)
def functions_have_few_positional_parameters(modules: Sequence[Module]) -> Iterator[Offence]:
    for module in modules:
        for function in () if module.is_test else module.functions:
            if function.positional > MOST_POSITIONAL and function.name not in POSITIONAL_EXCEPTIONS:
                text = f"{function.name} has {function.positional} positional parameters; make the later keyword-only"
                yield Offence(module.path, function.node.lineno, text)


# --- what must not be there


@rule(
    """
    import os
    os.path.join(os.environ["RANK"])
    os.environ.get("HOME")
    os.environ["RANDOM"] = ""
    os.getenv("RANK")
    dict(os.environ)
    os.environ.get(os.name)
    """,
    *(3, 4, 5, 6, 7),
    name="train.rank",
)
def environment_is_read_in_few_places(modules: Sequence[Module]) -> Iterator[Offence]:
    for module in modules:
        for variable, line in environment_variables(module):
            if not module.is_test and variable not in ENVIRONMENT.get(module.name, set()):
                yield Offence(module.path, line, f"touches the variable {variable}, which ENVIRONMENT does not grant it")


def environment_variables(module: Module) -> Iterator[tuple[str, int]]:
    """(name, line) of each variable that is read or set; "*" where the environment is used as a whole."""
    if not re.search("environ|getenv|putenv", module.text):
        return
    parents = {child: node for node in module.nodes for child in ast.iter_child_nodes(node)}
    for node in module.nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            if node.attr in ("getenv", "putenv"):
                yield "os.getenv: use os.environ", node.lineno
            if node.attr != "environ":
                continue
            parent = parents[node]
            call = parents.get(parents[node])
            if isinstance(parent, ast.Subscript) and isinstance(parent.slice, ast.Constant):
                yield parent.slice.value, node.lineno
            elif isinstance(parent, ast.Attribute) and isinstance(call, ast.Call) and call.args:
                yield call.args[0].value if isinstance(call.args[0], ast.Constant) else "*", node.lineno
            else:
                yield "*", node.lineno


@rule(
    """
    import pickle
    import torch
    pickle.load(file)
    yaml.load(file)
    yaml.safe_load(file)
    torch.load(file, weights_only=True)
    np.load(file)
    np.load(file, allow_pickle=False)
    A.from_pretrained(name, trust_remote_code=True)
    A.from_pretrained(name, trust_remote_code=False)
    """,
    *(1, 3, 4, 6, 7, 9),
)
def nothing_from_outside_is_unpickled(modules: Sequence[Module]) -> Iterator[Offence]:
    for module in modules:
        # One reads foreign pickled weights, when asked to, by torch's loader of nothing but tensors, and names its error.
        restricted = module.name == "train.convert.weights"
        unpicklers = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"} - ({"pickle"} if restricted else set())
        if module.is_test:
            continue
        for imported, line in module.imports.items():
            if imported.split(".")[0] in unpicklers:
                yield Offence(module.path, line, f"imports {imported}")
        for node in module.nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if (
                    called in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load")
                    or (called == "torch.load" and not (restricted and keywords.get("weights_only") == "True"))
                    or (called in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False")
                    or keywords.get("trust_remote_code", "False") != "False"
                ):
                    yield Offence(module.path, node.lineno, f"{called} runs what a foreign file says")


@rule(
    """
    try:
        f()
    except Exception:
        g()

    try:
        f()
    except:  # a reason
        g()

    # a reason
    try:
        f()
    except BaseException:
        g()

    try:
        f()
    except Exception:
        g()
        raise

    try:
        f()
    except ValueError:
        g()
    except:
        g()
    """,
    *(3, 27),
)
def broad_excepts_say_why(modules: Sequence[Module]) -> Iterator[Offence]:
    """In a comment before the `try` or at the handler; not needed where the last thing it does is to raise again."""
    for module in modules:
        lines = ["", *module.text.splitlines()]
        for block in () if module.is_test else (node for node in module.nodes if isinstance(node, ast.Try | ast.TryStar)):
            for handler in block.handlers:
                caught = "everything" if handler.type is None else ast.unparse(handler.type)
                last = handler.body[-1]
                raises_again = isinstance(last, ast.Raise) and last.exc is None
                if raises_again or caught not in ("everything", "Exception", "BaseException"):
                    continue
                near = [lines[block.lineno - 1], *lines[handler.lineno - 1 : handler.body[0].lineno]]
                if not any("#" in line for line in near):
                    yield Offence(module.path, handler.lineno, f"catches {caught} without a reason")


@rule("import json\n", 1)
def every_file_says_what_it_owns(modules: Sequence[Module]) -> Iterator[Offence]:
    for module in modules:
        if not module.is_test and not ast.get_docstring(module.tree):
            yield Offence(module.path, 1, "no docstring")


@rule('"""Odds and ends."""', 1, name="train.model.utils")
def files_are_named_after_what_they_own(modules: Sequence[Module]) -> Iterator[Offence]:
    for module in modules:
        if bad := set(module.name.split(".")) & FORBIDDEN_NAMES:
            yield Offence(module.path, 1, f"a file is named after what it owns, not {', '.join(bad)}")


@rule(f'first = "{min(MARKS)}"\nsecond = 2  # {min(MARKS)}: write it\n# {max(MARKS)} too\n', 2, 3)
def nothing_is_left_to_do(modules: Sequence[Module]) -> Iterator[Offence]:
    for module in modules:
        if any(mark in module.text for mark in MARKS):
            for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
                if token.type == tokenize.COMMENT and MARKS & set(token.string.replace(":", " ").split()):
                    yield Offence(module.path, token.start[0], token.string)


@pytest.mark.parametrize("name", RULES)
def test_rule_is_kept(name: str) -> None:
    assert_none(name, RULES[name].check(modules()))


@pytest.mark.parametrize("name", RULES)
def test_rule_finds_every_offence(name: str) -> None:
    found = RULES[name].check((RULES[name].broken,))
    assert sorted(offence.line for offence in found) == list(RULES[name].lines)


# --- tables without stale entries


def stale_in(table: str, entries: Collection[str]) -> Iterator[Offence]:
    path = Path(__file__ if table == "POSITIONAL_EXCEPTIONS" else design.__file__)
    lines = path.read_text(encoding="utf-8").splitlines()
    for entry in entries:
        line = next((number for number, text in enumerate(lines, 1) if f'"{entry.split(": ")[-1]}"' in text), 1)
        yield Offence(path, line, f"{table}: nothing needs {entry}")


def stale_order(modules: Sequence[Module]) -> Iterator[Offence]:
    planned = {"slurm"}  # part of the design, not of every tree
    entries = {*ORDER, *ONLY} - planned
    return stale_in("ORDER", {entry for entry in entries if not any(is_below(module.name, entry) for module in modules)})


def stale_environment(modules: Sequence[Module]) -> Iterator[Offence]:
    touched = {module.name: {name for name, _ in environment_variables(module)} for module in modules}
    granted = [(module, variable) for module, variables in ENVIRONMENT.items() for variable in variables]
    return stale_in(
        "ENVIRONMENT", [f"{module}: {variable}" for module, variable in granted if variable not in touched.get(module, ())]
    )


def stale_exceptions(modules: Sequence[Module]) -> Iterator[Offence]:
    needed = {
        function.name
        for module in modules
        for function in module.functions
        if function.positional > MOST_POSITIONAL and not module.is_test
    }
    return stale_in("POSITIONAL_EXCEPTIONS", POSITIONAL_EXCEPTIONS.keys() - needed)


STALE = [
    (stale_order, "train.host", {"train.host"}),
    (stale_environment, "train.host", {"train.host: SLURMD_NODENAME"}),
    (stale_exceptions, "train.model.heads", {"train.model.heads._ChunkedLoss.forward"}),
]


@pytest.mark.parametrize(("check", "without", "expected"), STALE, ids=[check.__name__ for check, *_ in STALE])
def test_tables_have_no_stale_entry(check: Callable, without: str, expected: set[str]) -> None:
    assert_none(check.__name__, check(modules()))
    left = [module for module in modules() if not is_below(module.name, without)]
    assert {offence.text.split(" needs ")[1] for offence in check(left)} == expected, "a missing module must be found"


# --- the configuration


def sections(schema: type) -> Iterator[type]:
    """`schema` and every dataclass below it."""
    yield schema
    for hint in typing.get_type_hints(schema).values():
        inner = dataclass_in(hint) or element_dataclass(hint)
        if inner:
            yield from sections(inner)


@cache
def all_sections() -> tuple[type, ...]:
    roots = (PretrainConfig, PrepareConfig, GenerateConfig, ExportConfig, ImportConfig, ImportedConfig, EvaluationConfig)
    found = {section for root in roots for section in sections(root)}
    return tuple(sorted(found, key=lambda section: section.__name__))


def offence_of(section: type, name: str, text: str) -> Offence:
    lines, first = inspect.getsourcelines(section)
    line = next((first + number for number, line in enumerate(lines) if line.strip().startswith(f"{name}:")), first)
    return Offence(Path(inspect.getfile(section)), line, text)


def names_read(node: ast.AST) -> Iterator[str]:
    """Attribute names that the code reads outside the configuration's own checks."""
    if isinstance(node, ast.FunctionDef) and (node.name == "__post_init__" or node.name.endswith("_problems")):
        return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield node.attr
    for child in ast.iter_child_nodes(node):
        yield from names_read(child)


def unread_fields(sections: Sequence[type], modules: Sequence[Module]) -> Iterator[Offence]:
    """By name, so a namesake can hide a field that is not; a field whose name is nowhere is certainly dead."""
    read = {name for module in modules if not module.is_test for name in names_read(module.tree)}
    for section in sections:
        for name in section.__dataclass_fields__:
            if name not in read:
                yield offence_of(section, name, f"nothing reads {section.__name__}.{name}")


def loose_sections(sections: Sequence[type]) -> Iterator[Offence]:
    for section in sections:
        if not section.__dataclass_params__.frozen:
            yield offence_of(section, "", f"{section.__name__} is not frozen")
        documented = field_documents(section)
        for name, field in section.__dataclass_fields__.items():
            if not field.kw_only:
                yield offence_of(section, name, f"{section.__name__}.{name} is not keyword-only")
            if name not in documented:
                yield offence_of(section, name, f"{section.__name__}.{name} has no line under it")


@dataclass
class LooseSection:
    documented: int = 1
    """A number."""
    bare: int = 2


def test_every_field_is_read() -> None:
    assert_none("every field is read", unread_fields(all_sections(), modules()))


def test_sections_are_frozen_keyword_only_and_documented() -> None:
    assert_none("sections", loose_sections(all_sections()))


def test_loose_sections_are_found() -> None:
    source = "def size_problems(it):\n    return it.documented\ndef use(it):\n    it.documented = it.bare"
    reader = Module(name="train.invented", path=Path("invented.py"), text=source)
    assert [offence.text for offence in unread_fields((LooseSection,), (reader,))] == ["nothing reads LooseSection.documented"]
    assert {offence.text.removeprefix("LooseSection") for offence in loose_sections((LooseSection,))} == {
        " is not frozen",
        ".documented is not keyword-only",
        ".bare is not keyword-only",
        ".bare has no line under it",
    }
