"""What the dataclasses say about a configuration: its fields by name, and what is wrong with a value, in words."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from conf.errors import ConfigError

_KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "finite": "must be a finite number",
    "bool": "must be true or false",
    "string": "must be text",
}


def leaf_names(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of all leaves of a dataclass."""
    names: list[str] = []
    hints = typing.get_type_hints(schema)
    for field in fields(schema):
        inner = dataclass_in(hints[field.name])
        names += leaf_names(inner, f"{prefix}{field.name}.") if inner else [f"{prefix}{field.name}"]
    return names


def nearest(name: str, known: Sequence[str]) -> str:
    """' Did you mean X?' for the nearest known name, or an empty text."""
    last = name.rsplit(".", 1)[-1]
    by_tail = {item.rsplit(".", 1)[-1]: item for item in reversed(known)}
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if not match and last:
        match = [by_tail[tail] for tail in difflib.get_close_matches(last, list(by_tail), n=1, cutoff=0.6)]
    return f" Did you mean {match[0]}?" if match else ""


def dataclass_in(hint: Any) -> type | None:
    """The dataclass in `hint`, also behind `X | None`; None for anything else."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [dataclass_in(part) for part in typing.get_args(hint)]
        return next((item for item in inner if item), None)
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def element_dataclass(hint: Any) -> type | None:
    """The dataclass that a tuple or a mapping in `hint` holds."""
    for part in typing.get_args(hint):
        found = dataclass_in(part) or element_dataclass(part)
        if found:
            return found
    return None


def shown(value: Any) -> str:
    """A value as one would write it on the command line, cut to a readable length."""
    text = {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    text = str(value) if text is None else text
    return text if len(text) <= 60 else text[:57] + "..."


def booleans_as_text(schema: type, tree: Any) -> Any:
    """`tree` with true and false as texts where `schema` wants a number: pydantic would take them for 1 and 0."""
    if not isinstance(tree, Mapping):
        return tree
    hints = typing.get_type_hints(schema)
    changed = dict(tree)
    for name, value in tree.items():
        hint = hints.get(name)
        inner = dataclass_in(hint)
        if inner:
            changed[name] = booleans_as_text(inner, value)
        elif isinstance(value, list) and (element := element_dataclass(hint)):
            changed[name] = [booleans_as_text(element, item) for item in value]
        elif isinstance(value, bool) and {int, float} & {hint, *typing.get_args(hint)}:
            changed[name] = shown(value)
    return changed


def describe(schema: type, finding: Any) -> list[str]:
    """Lines for one finding of pydantic: field, value, rule, way out."""
    place = [part for part in finding["loc"] if not str(part).startswith(("function-", "lax-or"))]
    field = _dotted(place)
    kind, value = finding["type"], finding["input"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return [_unknown(schema, name) for name in _leaves_below(field, value)]
    cause = finding.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # a dataclass's own rules, already collected
        return [f"{field}.{text}" if field else text for text in cause.problems]
    if isinstance(cause, ValueError):
        return [f"{field}: {cause}" if field else str(cause)]
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return [f"{field}: needs a value" + ("" if "[" in field else f"; give {field}=...")]
    return [f"{field}={shown(value)}: {_rule(schema, place, finding)}"]


def _rule(schema: type, place: Sequence[Any], finding: Any) -> str:
    """What a value of the wrong type should have been."""
    kind, value = finding["type"], finding["input"]
    field, hint = _dotted(place), _hint_at(schema, place)
    if kind == "literal_error":
        choices = [str(choice) for part in (hint, *typing.get_args(hint)) for choice in _literal_choices(part)]
        suggestion = nearest(str(value), choices)
        return f"must be {_either(choices)}{';' + suggestion.lower() if suggestion else ''}"
    if kind == "tuple_type":
        element = element_dataclass(hint)
        example = "{" + ", ".join(_must_give(element)) + "}" if element else "A,B"
        return f"must be a list, which is given as a whole: {field}=[{example}]"
    if inner := dataclass_in(hint):
        if isinstance(place[-1], int):
            return "must be written {" + ", ".join(_must_give(inner)) + "}, with further fields if need be"
        return f"is a section, not a value; set its fields, such as {field}.{fields(inner)[0].name}=..."
    or_null = " or null" if type(None) in typing.get_args(hint) else ""
    word = _KINDS.get(kind.split("_")[0])
    if word is None:
        return finding["msg"][:1].lower() + finding["msg"][1:]
    if kind == "string_type" and value is not None:
        if isinstance(place[-1], int):  # of a list, which is given as a whole
            field, value = _dotted(place[:-1]), f"['{shown(value)}', ...]"
            return f"""{word}{or_null}; quote it, and the whole for the shell: "{field}={value}\""""
        return f"""{word}{or_null}; quote it twice, for the shell and for YAML: {field}="'{shown(value)}'\""""
    return word + or_null


def _unknown(schema: type, name: str) -> str:
    leaves = leaf_names(schema)
    hints = [(leaf, element_dataclass(_hint_at(schema, leaf.split(".")))) for leaf in leaves]
    in_lists = [f"{leaf}[].{field.name}" for leaf, element in hints if element for field in fields(element)]
    suggestion = nearest(name, [*leaves, *in_lists]) or " --help lists the fields"
    return f"{name}: unknown key.{suggestion}"


def _leaves_below(name: str, value: Any) -> list[str]:
    """Dotted names of the leaves of `value`, which is called `name`."""
    if not isinstance(value, Mapping) or not value:
        return [name]
    return [leaf for key, item in value.items() for leaf in _leaves_below(f"{name}.{key}", item)]


def _dotted(place: Sequence[Any]) -> str:
    """data.sources[0].path for ("data", "sources", 0, "path")."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def _hint_at(schema: type, place: Sequence[Any]) -> Any:
    """The annotation of the field at `place`; None where there is none."""
    hint: Any = schema
    for part in place:
        inner = dataclass_in(hint)
        if isinstance(part, int):
            hint = element_dataclass(hint) or next(iter(typing.get_args(hint)), None)
        elif inner is None:
            return None
        else:
            hint = typing.get_type_hints(inner).get(part)
    return hint


def _literal_choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def _must_give(schema: type) -> list[str]:
    """`name: ...` for every field of `schema` without a default."""
    return [f"{f.name}: ..." for f in fields(schema) if f.default is MISSING and f.default_factory is MISSING]


def _either(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
