"""Hydra composes the YAML groups, pydantic validates them into frozen dataclasses. A leaf: imports nothing of ours
but its neighbours, and never torch, so that a mistake is told in well under a second.
"""

from __future__ import annotations

import itertools
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from conf.errors import ConfigError, UserError
from conf.schema import booleans_as_text, dataclass_in, describe, element_dataclass, nearest

CONF_FOLDER = Path(__file__).resolve().parent
ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True)
class Composition:
    """What Hydra made of the words, and what is wrong with those it could not take; `validate` tells both at once."""

    tree: dict[str, Any]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Catalog:
    """The groups that words may choose from."""

    root: str
    options: Mapping[str, Sequence[str]]
    """Options of every group, ours and the user's."""
    drawn: Sequence[str]
    """Groups that the root file names."""


def compose(root: str, overrides: Sequence[str], config_dir: str | None = None, *, verbatim: Sequence[str] = ()) -> Composition:
    """Compose `root`.yaml with `overrides` into a plain dictionary, interpolations resolved.

    `config_dir` is a folder of the user's own groups; what it holds is found beside ours. The values of the `verbatim` fields,
    which hold prose or code, are taken as they are, without Hydra's grammar; null and quoted values are not.
    Raises ConfigError where the words are too wrong for their values to be checked.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    # ${case:VALUE,{ONE:THIS,OTHER:THAT},ELSE}: for defaults that follow from another setting
    OmegaConf.register_new_resolver("case", lambda value, cases, usual: cases.get(value, usual), replace=True)
    catalog = _catalog(root, config_dir)
    given = [] if config_dir is None else [f"hydra.searchpath=[{_quoted(f'file://{Path(config_dir).resolve()}')}]"]
    problems: list[str] = []
    texts: dict[str, str] = {}
    for word in overrides:
        name, equals, value = word.partition("=")
        if name in verbatim and equals and not _is_marked(value):
            texts[name] = value
            continue
        taken, wrong = _understand(word, catalog)
        given += taken
        problems += wrong
    if any(problem.lstrip("+").startswith("experiment=") for problem in problems):
        raise ConfigError(problems)  # it would have set so much that every further finding is a guess
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF_FOLDER)):
            tree = OmegaConf.to_container(hydra.compose(config_name=root, overrides=given), resolve=True)
    except OmegaConfBaseException as error:
        what = _one_line(error).partition(" full_key: ")[0]
        raise ConfigError([*problems, f"{error.full_key}: {what}" if error.full_key else what]) from None
    except (HydraException, YAMLError) as error:
        raise ConfigError([*problems, _one_line(error)]) from None
    finally:
        GlobalHydra.instance().clear()
    composed = typing.cast(dict[str, Any], tree)
    for name, text in texts.items():
        *sections, leaf = name.split(".")
        place = composed
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = text
    return Composition(tree=composed, problems=tuple(problems))


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the words that hold several values, in Hydra's grammar and order.

    Raises ConfigError with every word that Hydra cannot read.
    """
    choices: list[list[str]] = []
    problems: list[str] = []
    for word in overrides:
        override = _parsed(word, problems)
        if override is None:
            continue
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([word])
    if problems:
        raise ConfigError(problems)
    return [list(combination) for combination in itertools.product(*choices)]


def _parsed(word: str, problems: list[str]) -> Any:
    """Hydra's reading of `word`; None, and the reason in `problems`, where it has none."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if "=" not in word.lstrip("=") and not word.startswith("~"):
        problems.append(f"{word}: not understood; settings are given as name=value")
        return None
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        name, _, value = word.partition("=")
        if value.startswith(("[", "{")):
            way_out = f"a list or a mapping is closed, and quoted for the shell as a whole: '{name}=[...]'"
        else:
            way_out = f"""text with spaces, commas, quotes or = is quoted twice, for the shell and for YAML: {name}="'a, b'\""""
        problems.append(f"{word}: not understood ({_one_line(error)}); {way_out}")
        return None


def _catalog(root: str, config_dir: str | None) -> _Catalog:
    """Find the groups.

    Raises ConfigError when the user's folder is missing, or holds an option that we have too: Hydra would take ours.
    """
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError([f"--config-dir={config_dir}: no such folder"])
    folders = [CONF_FOLDER] + ([Path(config_dir)] if config_dir else [])
    names = {entry.name for folder in folders for entry in folder.iterdir() if any(entry.glob("*.yaml"))}
    hidden = [
        f"--config-dir={config_dir}: {group}/{name}.yaml has the name of an option of Longhaul's own; give the file another"
        for group in sorted(names)
        if config_dir
        for name in sorted({*options(group)} & {file.stem for file in (Path(config_dir) / group).glob("*.yaml")})
    ]
    if hidden:
        raise ConfigError(hidden)
    return _Catalog(root=root, options={name: options(name, config_dir) for name in names}, drawn=list(groups(root)))


def _understand(word: str, catalog: _Catalog) -> tuple[list[str], list[str]]:
    """(what Hydra is given for `word`, what is wrong with it). A faulty word is left out, so that the rest can be checked."""
    unread: list[str] = []
    override = _parsed(word, unread)
    if override is None:
        return [], unread
    key = str(override.key_or_group)
    if not key or key.startswith("hydra."):
        return [], [f"{word}: {'not understood' if not key else 'Hydra itself has no settings here'}; leave it out"]
    if override.is_sweep_override():
        more = f"{word}: several values need -m, which runs one job for each; a list is written [a,b]"
        if not override.is_choice_sweep() or not isinstance(first := next(override.sweep_string_iterator(), None), str):
            return [], [more]
        taken, wrong = _understand(f"{override.get_key_element()}={first}", catalog)  # the rest is checked with the first value
        return taken, [more, *wrong]
    if key in catalog.options:
        return _choose(word, override, catalog)
    # Let a field be set whether or not the YAML mentions it: the schema, not the YAML, knows the fields.
    return [word if word[0] in "+~" else f"++{word}"], []


def _choose(word: str, override: Any, catalog: _Catalog) -> tuple[list[str], list[str]]:
    """`_understand` for the choice of a group's option."""
    group, value = override.key_or_group, override.value()
    known = catalog.options[group]
    added = word.startswith("+")
    if word.startswith("~"):
        return [word], []
    if group not in catalog.drawn and not added:
        ours = f"the groups here are {', '.join(catalog.drawn)}" if catalog.drawn else "there are no groups here"
        return [], [f"{word}: {catalog.root} has no group {group}; {ours}"]
    if value is None:
        return [f"~{group}"], []
    for choice in value if isinstance(value, list) else [value]:
        if choice not in known:
            return [], [f"{word}: no such option.{nearest(str(choice), known)} There are: {', '.join(known)}"]
    return [word.lstrip("+") if group in catalog.drawn else word], []


def validate(schema: type[ConfigT], composed: Composition | dict[str, Any]) -> ConfigT:
    """Turn what was composed, or a plain dictionary, into the frozen dataclass `schema`.

    Raises ConfigError with every unknown key, wrong type and failed rule at once.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if not isinstance(composed, Composition):
        composed = Composition(tree=composed)
    problems = list(composed.problems)
    _make_strict(schema, ConfigDict)
    value = None
    try:
        value = TypeAdapter(schema).validate_python(booleans_as_text(schema, composed.tree))
    except ValidationError as error:
        for finding in error.errors():
            problems.extend(describe(schema, finding))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return typing.cast(ConfigT, value)


def _make_strict(schema: type, config_dict: Any) -> None:
    """Tell pydantic, for `schema` and all dataclasses below it: an unknown key is an error, and so are nan and inf."""
    if "__pydantic_config__" in schema.__dict__:
        return
    schema.__pydantic_config__ = config_dict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
    for hint in typing.get_type_hints(schema).values():
        inner = dataclass_in(hint) or element_dataclass(hint)
        if inner:
            _make_strict(inner, config_dict)


def to_plain(config: Any) -> Any:
    """The dataclass as dictionaries, lists and scalars: what `config.yaml` holds."""
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_plain(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_plain(item) for item in config]
    if isinstance(config, dict):
        return {str(key): to_plain(item) for key, item in config.items()}
    return str(config) if isinstance(config, (str, Path)) else config


def as_yaml(config: Any) -> str:
    """The text of `config.yaml`."""
    import yaml

    return yaml.safe_dump(to_plain(config), sort_keys=False, width=120)


def write_config(config: Any, path: Path) -> None:
    """Write `config` as YAML at `path`, atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(as_yaml(config), encoding="utf-8")
    temporary.replace(path)


def read_config(schema: type[ConfigT] | Mapping[str, type[ConfigT]], path: Path) -> ConfigT:
    """Read a `config.yaml` that `write_config` wrote. Of several schemas it is of the one that its `stage` names,
    or, older than that, of the first.

    Raises UserError when the file is missing, is no YAML or does not fit `schema`.
    """
    tree = _read_tree(path)
    if isinstance(schema, Mapping):
        stage = tree.get("stage", next(iter(schema)))
        if stage not in schema:
            raise UserError(f"{path}: is of `{stage}`; here it must be of {' or '.join(schema)}")
        schema = schema[stage]
    try:
        return validate(schema, tree)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None


def _read_tree(path: Path) -> dict[str, Any]:
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is it the folder of a run?") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: damaged, it is not YAML ({_one_line(error)}); put back what the run wrote") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: damaged, it holds no settings; put back what the run wrote")
    return tree


def options(group: str, config_dir: str | None = None) -> list[str]:
    """Names that `group=NAME` accepts, ours and those of the user's `config_dir`."""
    folders = [CONF_FOLDER / group] + ([Path(config_dir) / group] if config_dir else [])
    return sorted({file.stem for folder in folders if folder.is_dir() for file in folder.glob("*.yaml")})


def groups(root: str) -> dict[str, str | None]:
    """The groups that `root`.yaml draws from, in its own order, each with the option it takes by itself; None: none."""
    text = (CONF_FOLDER / f"{root}.yaml").read_text(encoding="utf-8")
    found = re.findall(r"^\s*-\s+(?:optional\s+)?(?:override\s+)?/?([a-z_]+)(?:@[\w.]+)?:\s*(\w+)", text, flags=re.M)
    return {group: None if option == "null" else option for group, option in found}


def _quoted(text: str) -> str:
    """`text` as a quoted value in Hydra's grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _is_marked(value: str) -> bool:
    """Whether a text says by itself how it is meant: nothing, or what stands between the quotes."""
    return value == "null" or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\"")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
