"""Which columns of a file are which parts of a row: as the task names them, or found by their usual names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from string import Formatter
from typing import Any

from conf.errors import UserError
from data_pipeline.task_config import TaskConfig

Values = Mapping[str, Any]
MISSING = object()
PREVIEW = 20
TARGET = "target"
"""What TaskConfig.target is unless it was given."""
WAY_OUT = {
    "preference": "name them by task.fields={prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}",
    "dialogue": "name them by task.fields={instruction: COLUMN, output: COLUMN}",
    "classification": "name them by task.fields={sentence: COLUMN, label: COLUMN}, or give task.prompt and task.target",
    "generation": "name them by task.fields={document: COLUMN, summary: COLUMN}, or give task.prompt and task.target",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A usual set of columns."""

    name: str
    """What a person calls it."""
    columns: Mapping[str, tuple[str, ...]]
    """The columns that it needs, by our names for them, each with the names that files give it."""
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Columns that it may have besides."""
    prompt: str = ""
    """What the model is given; empty for dialogues."""
    target: str = ""
    """Our name of the truth's column."""
    prefix: str = " "
    """What stands between prompt and truth."""


DIALOGUES = (
    Family(name="messages", columns={"messages": ("messages",)}, optional={"tools": ("tools",)}),
    Family(
        name="sharegpt",
        columns={"conversations": ("conversations",)},
        optional={"system": ("system",), "tools": ("tools",)},
    ),
    Family(
        name="alpaca",
        columns={"instruction": ("instruction",), "output": ("output", "response")},
        optional={"input": ("input", "context"), "system": ("system",), "history": ("history",)},
    ),
    Family(
        name="prompt and completion",
        columns={"prompt": ("prompt",), "completion": ("completion", "response")},
        optional={"system": ("system",), "tools": ("tools",)},
    ),
)
CLASSIFICATIONS = (
    *(
        Family(
            name="two sentences and a label",
            columns={"sentence1": (first,), "sentence2": (second,), "label": ("label",)},
            prompt="{sentence1}\n{sentence2}",
            target="label",
        )
        for first, second in (
            ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
        )
    ),
    Family(
        name="a sentence and a label",
        columns={"sentence": ("sentence", "text"), "label": ("label", "target")},
        prompt="{sentence}",
        target="label",
    ),
)  # fmt: skip
GENERATIONS = (
    Family(
        name="question answering",
        columns={"context": ("context",), "question": ("question",), "answers": ("answers", "answer")},
        prompt="{context}\n\nQuestion: {question}\nAnswer:",
        target="answers",
    ),
    Family(
        name="summarisation",
        columns={"document": ("document", "article", "text"), "summary": ("summary", "highlights")},
        prompt="{document}\n\nSummary:",
        target="summary",
    ),
    Family(name="translation", columns={"translation": ("translation",)}, prompt="{text}\n", target="target", prefix=""),
    Family(
        name="text and target",
        columns={"text": ("text",), "target": ("target",)},
        prompt="{text}\n",
        target="target",
        prefix="",
    ),
    Family(
        name="prompt and completion",
        columns={"prompt": ("prompt",), "completion": ("completion", "response")},
        prompt="{prompt}",
        target="completion",
        prefix="",
    ),
)
PREFERENCES = (
    Family(
        name="chosen and rejected",
        columns={"chosen": ("chosen",), "rejected": ("rejected",)},
        optional={"prompt": ("prompt", "question", "instruction"), "system": ("system",), "tools": ("tools",)},
        prompt="{prompt}",
        target="chosen",
        prefix="",
    ),
)
FAMILIES = {
    "dialogue": DIALOGUES, "classification": CLASSIFICATIONS, "generation": GENERATIONS, "preference": PREFERENCES,
}  # fmt: skip
# Names that the prompts of conf/task use, and the other names that files have for them.
ALIASES = {
    "document": ("article", "text"), "summary": ("highlights",), "completion": ("response",), "answers": ("answer",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a file's columns become rows."""

    name: str
    """What was found, for a person; empty: the task names all."""
    columns: Mapping[str, str]
    """Our names for columns, and the file's own."""
    prompt: str = ""
    """See Family."""
    target: str = ""
    """Column of the truth, with dots into nested fields."""
    prefix: str = " "
    """See Family."""

    def get(self, values: Values, name: str) -> Any:
        """The value of a column by our name for it; MISSING where the row has none."""
        return lookup(values, self.columns.get(name, name))

    def filled(self, values: Values) -> dict[str, Any]:
        """The row's columns, and those that have another name for us under ours."""
        ours = {name: found for name, path in self.columns.items() if (found := lookup(values, path)) is not MISSING}
        return {**values, **ours}

    def words(self) -> str:
        """What was found, in a few words."""
        columns = ", ".join(ours if ours == path else f"{ours}={path}" for ours, path in self.columns.items())
        return f"{self.name} ({columns})" if columns else self.name


def lookup(values: Values, path: str) -> Any:
    """The value of a column, or of a field inside, by dots; MISSING where there is none. A name with a dot goes first."""
    found: Any = values
    for part in [path] if path in values else path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return MISSING
        found = found[part]
    return found


def is_null(value: Any) -> bool:
    """Whether there is nothing in a column: null, or NaN, which is what a table of numbers has for it."""
    return value is None or (isinstance(value, float) and isnan(value))


def layout_of(task: TaskConfig, values: Values) -> Layout:
    """What the columns of `values`, a row of the file, are. Raises UserError where that is not clear, without a place."""
    families = FAMILIES[task.kind]
    if task.prompt:
        return _named_layout(task, values)
    _check_fields(task, families)
    columns = {**values, **{name: lookup(values, path) for name, path in task.fields.items()}}
    fitting = [(family, chosen) for family in families if (chosen := _choose(family, task, columns, values)) is not None]
    if not fitting:
        raise UserError(_nothing_fits(task, families, values))
    if len(fitting) > 1 or any(len(names) > 1 for names in fitting[0][1].values()):
        several = [f"{family.name} ({', '.join('|'.join(names) for names in chosen.values())})" for family, chosen in fitting]
        raise UserError(f"its columns {names_of(values)} fit {' and '.join(several)}; {WAY_OUT[task.kind]}")
    family, chosen = fitting[0]
    found = {name: names[0] for name, names in chosen.items()}
    if family.name == "translation":
        found = _languages(task, lookup(values, found["translation"]), found["translation"])
    target = _inside(values, found.get(family.target, family.target)) if task.target == TARGET else task.target
    prefix = family.prefix if task.target_prefix is None else task.prefix_text
    return Layout(name=family.name, columns=found, prompt=family.prompt, target=target, prefix=prefix)


def _choose(family: Family, task: TaskConfig, columns: Values, values: Values) -> dict[str, list[str]] | None:
    """The file's columns for each of the family's, several where it is not clear; None where one is missing."""
    chosen: dict[str, list[str]] = {}
    for name, usual in {**family.columns, **family.optional}.items():
        if name in task.fields:
            found = [task.fields[name]] if columns[name] is not MISSING else []
        else:
            found = [other for other in usual if other in values]
        if not found and name in family.columns:
            return None
        if found:
            chosen[name] = found
    return chosen


def _named_layout(task: TaskConfig, values: Values) -> Layout:
    """The prompt names its columns; of those that the file does not have, what it calls them is known for a few."""
    columns = dict(task.fields)
    if "translation" in values and isinstance(values["translation"], Mapping) and not {"text", "target"} & set(values):
        columns = _languages(task, values["translation"], "translation") | columns
    used = {name.partition("[")[0] for _, name, _, _ in Formatter().parse(task.prompt) if name}
    wanted = used | ({*ALIASES} if task.target == TARGET else {task.target.partition(".")[0]})
    for name in sorted(wanted & set(ALIASES)):
        others = [other for other in ALIASES[name] if other in values and other not in used]
        if name not in values and name not in columns and len(others) == 1:
            columns[name] = others[0]
    target = _usual_target(task, {**values, **columns}) if task.target == TARGET else task.target
    head, dot, rest = target.partition(".")
    path = target if target in values else f"{columns.get(head, head)}{dot}{rest}"
    if head in columns and isinstance(lookup(values, columns[head]), str):
        path = columns[head]
    return Layout(
        name="",
        columns=columns,
        prompt=task.prompt_text,
        target=_inside(values, path),
        prefix=task.prefix_text,
    )


def _usual_target(task: TaskConfig, columns: Values) -> str:
    """Our name of the truth's column, where the task does not tell."""
    if TARGET in columns:
        return TARGET
    found = [name for name in dict.fromkeys(family.target for family in FAMILIES[task.kind]) if name in columns]
    if len(found) > 1:
        raise UserError(f"its columns {' and '.join(found)} may both be the truth; give task.target={found[0]}")
    return found[0] if found else TARGET


def _inside(values: Values, path: str) -> str:
    """`path`; the field `text` in it where the column holds fields, as SQuAD's answers do; the column where it holds none."""
    found = lookup(values, path)
    if isinstance(found, Mapping) and "text" in found:
        return f"{path}.text"
    whole = path.removesuffix(".text")
    return whole if found is MISSING and isinstance(lookup(values, whole), list) else path


def _languages(task: TaskConfig, translation: Any, path: str) -> dict[str, str]:
    """Which language of a translation is read and which is written."""
    codes = list(translation) if isinstance(translation, Mapping) else []
    source, target = task.source_language, task.target_language
    for name, code in (("source_language", source), ("target_language", target)):
        if code is not None and code not in codes:
            raise UserError(f"task.{name}={code}: column {path} has {', '.join(codes) or 'no languages'}; give one of these")
    if len(codes) == 2 and (source is None) != (target is None):
        (other,) = (code for code in codes if code not in (source, target))
        source, target = source or other, target or other
    if source is None or target is None:
        raise UserError(
            f"column {path} has {', '.join(codes) or 'no languages'}, and which to translate into is not clear; give "
            "task.source_language and task.target_language"
        )
    return {"text": f"{path}.{source}", "target": f"{path}.{target}"}


def _check_fields(task: TaskConfig, families: Sequence[Family]) -> None:
    known = sorted({name for family in families for name in (*family.columns, *family.optional)})
    if unknown := [name for name in task.fields if name not in known]:
        raise UserError(f"task.fields: {unknown[0]} is no part of task={task.kind}; there are {', '.join(known)}")


def _nothing_fits(task: TaskConfig, families: Sequence[Family], values: Values) -> str:
    if {"chosen", "rejected"} <= set(values) and task.kind != "preference":
        return "its columns chosen and rejected are preferences; give task=preference, or take rows with answers alone"
    usual = "; ".join(
        dict.fromkeys(
            f"{family.name}: {', '.join('|'.join(names) for names in family.columns.values())}" for family in families
        )
    )
    gone = [f"{name}={path}" for name, path in task.fields.items() if lookup(values, path) is MISSING]
    head = f"task.fields names {', '.join(gone)}, which its rows have not; " if gone else ""
    return f"{head}its columns {names_of(values)} are none that task={task.kind} knows ({usual}); {WAY_OUT[task.kind]}"


def names_of(values: Values) -> str:
    """The names of a row's columns."""
    return ", ".join(map(str, list(values)[:PREVIEW])) or "none"
