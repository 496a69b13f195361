"""Hydra composes the YAML groups, pydantic validates them into frozen dataclasses. A leaf: imports nothing of ours
but the error type, and never torch, so that a mistake is told in well under a second.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from conf.errors import ConfigError, UserError

CONF_FOLDER = Path(__file__).resolve().parent
ConfigT = TypeVar("ConfigT")
PROBLEMS = "__problems__"  # key of a composed tree under which the faulty words travel to `validate`


def compose(root: str, overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """Compose `root`.yaml with `overrides` into a plain dictionary, interpolations resolved.

    `config_dir` is a folder of the user's own groups; what it holds is found beside ours.
    Raises ConfigError for an unknown group, an unknown option of a group, an unknown key or bad syntax.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError([f"--config-dir={config_dir}: no such folder"])
    search = [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    group_names = known_groups(config_dir)
    problems: list[str] = []
    words = [word for word in overrides if not problems_of(word, group_names, config_dir, problems)]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF_FOLDER)):
            composed = hydra.compose(config_name=root, overrides=search + [_forced(word, group_names) for word in words])
            tree = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([*problems, _one_line(error)]) from None
    finally:
        GlobalHydra.instance().clear()
    if problems:
        tree[PROBLEMS] = problems  # what the schema finds is added to these, so that all is told at once
    return tree


def known_groups(config_dir: str | None) -> set[str]:
    """Names of all groups, ours and those of the user's folder."""
    folders = [CONF_FOLDER] + ([Path(config_dir)] if config_dir else [])
    return {entry.name for folder in folders for entry in folder.iterdir() if entry.is_dir() and any(entry.glob("*.yaml"))}


def problems_of(word: str, group_names: set[str], config_dir: str | None, problems: list[str]) -> bool:
    """Whether Hydra could not take `word`; why is added to `problems`."""
    key, equals, value = word.lstrip("+~").partition("=")
    if not equals and not word.startswith("~"):
        problems.append(f"{word}: not understood; settings are given as name=value")
        return True
    if key in group_names and value not in ("null", *options(key, config_dir)):
        known = options(key, config_dir)
        problems.append(f"{key}={value}: no such option.{nearest(value, known)} There are: {', '.join(known)}")
        return True
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        problems.append(f"{word}: {_one_line(error)}")
        return True
    if override.is_sweep_override():
        problems.append(f"{word}: several values need -m, which runs one job for each; a list is written [a,b]")
        return True
    return False


def _forced(word: str, group_names: set[str]) -> str:
    """Let a field be set whether or not the YAML mentions it: the schema, not the YAML, knows the fields."""
    key = word.partition("=")[0]
    plain = key[:1] not in "+~" and not key.startswith("hydra.") and key.partition("@")[0] not in group_names
    return f"++{word}" if plain else word


def validate(schema: type[ConfigT], tree: dict[str, Any]) -> ConfigT:
    """Turn a composed dictionary into the frozen dataclass `schema`.

    Raises ConfigError with every unknown key, wrong type and failed rule at once.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    tree = dict(tree)
    problems: list[str] = list(tree.pop(PROBLEMS, []))
    _forbid_unknown_keys(schema, ConfigDict)
    value = None
    try:
        value = TypeAdapter(schema).validate_python(tree)
    except ValidationError as error:
        for item in error.errors():
            problems.extend(_describe(schema, item))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return typing.cast(ConfigT, value)


def to_plain(config: Any) -> Any:
    """The dataclass as dictionaries, lists and scalars: what `config.yaml` holds."""
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_plain(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_plain(item) for item in config]
    if isinstance(config, dict):
        return {str(key): to_plain(item) for key, item in config.items()}
    if isinstance(config, Path):
        return str(config)
    return str(config) if isinstance(config, str) else config


def write_config(config: Any, path: Path) -> None:
    """Write `config` as YAML at `path`, atomically."""
    import yaml

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(yaml.safe_dump(to_plain(config), sort_keys=False, width=120), encoding="utf-8")
    os.replace(temporary, path)


def read_config(schema: type[ConfigT], path: Path) -> ConfigT:
    """Read a `config.yaml` that `write_config` wrote.

    Raises UserError when the file is missing, ConfigError when it does not fit `schema`.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is it the folder of a run?") from None
    return validate(schema, yaml.safe_load(text))


def options(group: str, config_dir: str | None = None) -> list[str]:
    """Names that `group=NAME` accepts, ours and those of the user's `config_dir`."""
    folders = [CONF_FOLDER / group] + ([Path(config_dir) / group] if config_dir else [])
    return sorted({file.stem for folder in folders if folder.is_dir() for file in folder.glob("*.yaml")})


def groups(root: str) -> list[str]:
    """Names of the groups that `root`.yaml draws from, in its own order, with the optional ones."""
    text = (CONF_FOLDER / f"{root}.yaml").read_text(encoding="utf-8")
    found = re.findall(r"^\s*-\s+(?:optional\s+)?(?:override\s+)?/?([a-z_]+)(?:@[\w.]+)?:", text, flags=re.M)
    return list(dict.fromkeys(found))


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


def _element_dataclass(hint: Any) -> type | None:
    """The dataclass that a tuple or a mapping in `hint` holds."""
    for part in typing.get_args(hint):
        found = dataclass_in(part) or _element_dataclass(part)
        if found:
            return found
    return None


def _forbid_unknown_keys(schema: type, config_dict: Any) -> None:
    """Tell pydantic, for `schema` and all dataclasses below it, that a key it does not know is an error."""
    if "__pydantic_config__" in schema.__dict__:
        return
    schema.__pydantic_config__ = config_dict(extra="forbid")  # type: ignore[attr-defined]
    for hint in typing.get_type_hints(schema).values():
        inner = dataclass_in(hint) or _element_dataclass(hint)
        if inner:
            _forbid_unknown_keys(inner, config_dict)


def _describe(schema: type, item: Any) -> list[str]:
    """Lines for one finding of pydantic: field, value, rule, way out."""
    field = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("function-", "lax-or")))
    kind = item["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        leaves = leaf_names(schema)
        parts = {leaf.rsplit(".", depth)[0] for leaf in leaves for depth in range(1, leaf.count(".") + 1)}
        return [f"{field}: unknown key.{nearest(field, [*sorted(parts, key=len), *leaves])}"]
    cause = item.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # a dataclass's own rules, already collected
        return [f"{field}.{text}" if field else text for text in cause.problems]
    if isinstance(cause, ValueError):
        return [f"{field}: {cause}" if field else str(cause)]
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return [f"{field}: needs a value; give {field}=..."]
    return [f"{field}={_shown(item['input'])}: {_lower_first(item['msg'])}"]


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
