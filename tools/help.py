"""Help texts, drawn from the dataclasses and the YAML groups themselves; nothing heavy is imported."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any

from conf.compose import groups, options
from conf.schema import dataclass_in, element_dataclass, shown

WIDTH = 118


def overview(verbs: Mapping[str, Any]) -> str:
    """Text of `longhaul --help`."""
    lines = ["usage: longhaul VERB [GROUP=OPTION ...] [FIELD=VALUE ...] [-m] [--config-dir DIR] [--help]", "", "verbs:"]
    lines += [f"  {name:<10} {verb.summary}" for name, verb in verbs.items()]
    lines += [
        "",
        "Every verb prints its groups and fields with --help. Settings are Hydra overrides: model=llama_160m optim.lr=1e-3.",
        "-m runs one process for each combination of comma-separated values; --config-dir brings groups of your own.",
    ]
    return "\n".join(lines)


def verb_help(name: str, verb: Any, config_dir: str | None) -> str:
    """Text of `longhaul VERB --help`: examples, groups with their options, fields with type, default and meaning."""
    module, _, attribute = verb.schema.partition(":")
    schema = getattr(importlib.import_module(module), attribute)
    lines = [f"longhaul {name}: {verb.summary}", ""]
    if verb.examples:
        lines += ["examples:", *(f"  {example}" for example in verb.examples), ""]
    drawn = groups(verb.root)
    if drawn:
        lines.append("groups (GROUP=OPTION):")
        for group, default in drawn.items():
            choices = " | ".join(options(group, config_dir)) + (f"  (default {default})" if default else "")
            lines += textwrap.wrap(f"{group:<12} {choices}", WIDTH, initial_indent="  ", subsequent_indent=" " * 15)
        lines += ["", "fields (FIELD=VALUE), with the default where the chosen options say nothing:"]
    else:
        lines.append("fields (FIELD=VALUE):")
    lines += _field_lines(schema, "")
    return "\n".join(lines)


def _field_lines(schema: type, prefix: str) -> list[str]:
    lines = []
    hints = typing.get_type_hints(schema)
    documents = field_documents(schema)
    for field in fields(schema):
        inner = dataclass_in(hints[field.name])
        if inner is not None:
            lines += ["", f"  {prefix}{field.name}: {documents.get(field.name, '')}"]
            lines += _field_lines(inner, f"{prefix}{field.name}.")
            continue
        head = f"{prefix}{field.name}  {_type_text(hints[field.name])}{_default_text(field)}"
        lines += textwrap.wrap(head, WIDTH, initial_indent="  ", subsequent_indent=" " * 6)
        indent = " " * 6
        lines += textwrap.wrap(documents.get(field.name, ""), WIDTH, initial_indent=indent, subsequent_indent=indent)
        if element := element_dataclass(hints[field.name]):
            lines += _field_lines(element, f"{prefix}{field.name}[].")
    return lines


@cache
def field_documents(schema: type) -> dict[str, str]:
    """The line under each field of a dataclass, those that it has from others included."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if is_dataclass(base):
            found |= _own_documents(base)
    return found


def _own_documents(schema: type) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        text = following.value if isinstance(following, ast.Expr) else None
        is_document = isinstance(text, ast.Constant) and isinstance(text.value, str)
        if is_document and isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = " ".join(text.value.split())
    return found


def _type_text(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is tuple:
        inner = dataclass_in(arguments[0])
        if inner:
            return "[{" + ", ".join(f"{field.name}: ..." for field in fields(inner)) + "}, ...]"
        return f"[{_type_text(arguments[0])}, ...]"
    if arguments:
        return " | ".join(_type_text(part) for part in arguments)
    if hint is type(None):
        return "null"
    return getattr(hint, "__name__", str(hint))


def _default_text(field: Field) -> str:
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    else:
        return "  (required)"
    return f"  = {_value_text(value)}"


def _value_text(value: Any) -> str:
    """A default as one would give it on the command line; of a dataclass, what has to be given."""
    if is_dataclass(value):
        given = [field for field in fields(value) if getattr(value, field.name) != field.default]
        return "{" + ", ".join(f"{field.name}: {_value_text(getattr(value, field.name))}" for field in given) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_value_text, value)) + "]"
    text = shown(value)
    return text if text.strip() else f"'{text}'"
