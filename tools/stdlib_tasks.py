"""`longhaul stdlib-tasks`: two labelled tasks from the source files of Python's standard library, which every machine has.

classification  text, label: which package a docstring is from. The names of all packages that are labels are masked in every
                text, wherever they stand and however they are written (XMLParser -> …Parser): the task is what the text is
                about. Words of the subject (DOM, event loop, Tk) stay, as they are the subject.
summarisation   document, summary: a function's source without its docstring, and the docstring's first line. Besides: body and
                signature, which are the document in two parts, and name.

Rows are parted by file, never within one: neighbours share words and habits. What a prepared corpus of the same files holds
out becomes the test rows, so that a model trained on that corpus has read none of them; of the other files an eighth, by the
hash of the name, is for validation. Tests are left out. A text that is there twice is kept once; a docstring that is there
in two packages is dropped.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import platform
import re
import secrets
import shutil
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from conf.errors import ConfigError, UserError
from data_pipeline.io import json_lines, read_json, read_json_lines, sync_folder, write_json
from data_pipeline.manifest import read_manifest

STDLIB = "stdlib:"
MANIFEST_FILE = "manifest.json"
MASK = "…"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
TEXT_CHARACTERS = (20, 400)  # of a docstring; of a longer one the beginning
DOCUMENT_CHARACTERS = (40, 800)
SUMMARY_WORDS = (3, 14)
LEAST_ROWS: dict[Split, int] = {"train": 40, "validation": 1, "test": 10}  # of a package, for it to be a label
MOST_LABELS = 10  # where their number is not given
MOST_ROWS_OF_A_FILE = 60  # tkinter/__init__.py alone has 550 docstrings

Split = Literal["train", "validation", "test"]
Function = ast.FunctionDef | ast.AsyncFunctionDef
Rows = dict[Split, list[dict[str, str]]]


@dataclass(frozen=True, kw_only=True)
class StdlibTasksConfig:
    out: str = ""
    """Folder to make, such as data/stdlib_tasks."""
    source: str = STDLIB
    """Folder with Python files; stdlib: is this Python's standard library."""
    held_out_of: str | None = None
    """Folder of a prepared corpus of the same files: the documents that it holds out become the test rows; null: a fifth of
    the files, by the hash of their names."""
    labels: int | None = None
    """Packages to tell apart, those with the most docstrings; null: all that have enough of them, 10 at most, as a library has
    other packages with each version and distribution of Python."""
    most_held_out: int | None = 400
    """Rows of each task that are kept for validation, and for the test: a sample of them, as a model writes some ten a
    second on a CPU; null: all."""

    def __post_init__(self) -> None:
        problems = []
        if not self.out:
            problems.append("out='': needs a folder to make; give out=data/stdlib_tasks")
        if not self.source:
            problems.append("source='': needs a folder with Python files; stdlib: is the standard library")
        if self.held_out_of == "":
            problems.append("held_out_of='': needs the folder of a prepared corpus; null chooses the test files by their names")
        if self.labels is not None and self.labels < 2:
            problems.append(f"labels={self.labels}: must be at least 2; null takes what there is")
        if self.most_held_out is not None and self.most_held_out < 1:
            problems.append(f"most_held_out={self.most_held_out}: must be at least 1; null keeps all")
        if problems:
            raise ConfigError(problems)


def run(config: StdlibTasksConfig) -> int:
    """Make the rows and print how many there are; a folder that was made with the same settings stays as it is. Returns 0.

    Raises UserError, and writes nothing, for a source or a corpus that does not do, and for a folder that is there.
    """
    out, made_of = Path(config.out), _made_of(config)
    if os.path.lexists(out):
        path = out / MANIFEST_FILE
        if path.is_file() and read_json(path).get("made_of") == made_of:
            print(f"{out}: is there already, made with these settings; nothing to do")
            return 0
        raise UserError(f"{out}: exists, and was not made with these settings; remove it, or give another out=FOLDER")
    root = Path(sysconfig.get_path("stdlib")) if config.source == STDLIB else Path(config.source)
    files, unread = read_sources(root)
    split_of = _splits(files, config.held_out_of)
    labels, classification = docstring_rows(files, split_of, num_labels=config.labels)
    tasks = {
        "classification": mixed(classification, most_held_out=config.most_held_out),
        "summarisation": mixed(summary_rows(files, split_of), most_held_out=config.most_held_out),
    }
    for task, rows in tasks.items():
        if empty := [split for split in SPLITS if not rows[split]]:
            raise UserError(f"{root}: leaves no rows of {task} for {', '.join(empty)}; it needs more files")
    counts = {task: {split: len(rows[split]) for split in SPLITS} for task, rows in tasks.items()}
    by_label = {
        split: dict(sorted(Counter(row["label"] for row in tasks["classification"][split]).items())) for split in SPLITS
    }
    _write(out, tasks, {"made_of": made_of, "labels": labels, "rows": counts, "rows_by_label": by_label})
    could_not = f", {unread:,} could not be read" if unread else ""
    print(f"read             {len(files):,} files that are no tests{could_not}", *_lines(config, counts, by_label), sep="\n")
    return 0


def _made_of(config: StdlibTasksConfig) -> dict[str, Any]:
    fingerprint = None if config.held_out_of is None else read_manifest(config.held_out_of).fingerprint
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    return {**settings, "corpus_fingerprint": fingerprint, "python": platform.python_version()}


# --- files


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file that was read."""

    name: str
    """Path below the source, such as email/parser.py."""
    lines: tuple[str, ...]
    """As the syntax tree counts them: a form feed begins no line."""
    tree: ast.Module

    @property
    def package(self) -> str | None:
        """The top package; None for a module that stands alone, which cannot be on both sides of a split by file."""
        return self.name.partition("/")[0] if "/" in self.name else None


def read_sources(root: Path) -> tuple[list[SourceFile], int]:
    """The Python files below `root` that are no tests, by name, and the number of those that are not UTF-8 or not Python.

    Raises UserError for a folder that is not there or has none.
    """
    if not root.is_dir():
        raise UserError(f"source={root}: no such folder; stdlib: is this Python's standard library")
    names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    files, unread = [], 0
    for name in names:
        if LEFT_OUT & set(name.parts) or re.fullmatch(r"test_.*|.*_test", name.stem):
            continue
        try:
            text = io.StringIO((root / name).read_bytes().decode("utf-8-sig"), newline=None).read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old escapes in old files
                tree = ast.parse(text)
        except (OSError, ValueError, SyntaxError):  # ValueError: not UTF-8, or NUL bytes
            unread += 1
            continue
        files.append(SourceFile(name=name.as_posix(), lines=tuple(text.split("\n")), tree=tree))
    if not files:
        raise UserError(f"source={root}: holds no Python file that can be read and is no test; give another folder")
    return files, unread


def _splits(files: Sequence[SourceFile], corpus: str | None) -> dict[str, Split]:
    """Name of a file -> its split; a file that the corpus has set aside, such as a copy of another, is in none.

    Raises UserError for a corpus that holds none of the files out.
    """
    names = [file.name for file in files]
    if corpus is None:
        return {name: "test" if _draw(name, "test") < 0.2 else _train_or_validation(name) for name in names}
    manifest, place = read_manifest(corpus), {}
    for shard in manifest.shards:
        for document in read_json_lines(Path(corpus) / f"{shard.stem}.ids.jsonl"):
            place[document.partition("/")[2]] = shard.split  # an id begins with the name of the corpus
    found: dict[str, Split] = {
        name: "test" if place[name] == "validation" else _train_or_validation(name) for name in names if name in place
    }
    if "test" not in found.values():
        raise UserError(
            f"held_out_of={corpus}: holds out none of these files; prepare it with held_out_fraction=0.2, or give "
            "held_out_of=null, and say then that the model has read the test rows"
        )
    return found


def _train_or_validation(name: str) -> Split:
    return "validation" if _draw(name, "validation") < 0.125 else "train"


def _draw(name: str, purpose: str) -> float:
    """A number from 0 to below 1 that depends on the two words alone."""
    return int.from_bytes(hashlib.blake2b(f"{purpose}\0{name}".encode(), digest_size=8).digest(), "big") / 2**64


# --- which package a docstring is from


def docstring_rows(
    files: Sequence[SourceFile], split_of: Mapping[str, Split], *, num_labels: int | None
) -> tuple[list[str], Rows]:
    """The labels, by name, and the rows of each split, in the order of the files. num_labels: None takes what there is.

    Raises UserError where fewer packages have enough docstrings.
    """
    found = [
        {"text": text, "label": file.package, "kind": kind, "file": file.name}
        for file in files
        if file.package is not None and file.name in split_of
        for kind, text in _docstrings(file)
    ]
    packages_of: dict[str, set[str]] = {}
    for row in found:
        packages_of.setdefault(_key(row["text"]), set()).add(row["label"])
    once, of_file = {}, Counter()
    for row in found:
        key = _key(row["text"])
        if len(packages_of[key]) == 1 and key not in once and of_file[row["file"]] < MOST_ROWS_OF_A_FILE:
            once[key] = row
            of_file[row["file"]] += 1
    counts = {split: Counter(row["label"] for row in once.values() if split_of[row["file"]] == split) for split in SPLITS}
    enough = [
        label
        for label, _ in sum(counts.values(), Counter()).most_common()
        if all(counts[split][label] >= LEAST_ROWS[split] for split in SPLITS)
    ]
    wanted = num_labels or min(MOST_LABELS, max(2, len(enough)))
    if len(enough) < wanted:
        raise UserError(
            f"labels={wanted}: only {len(enough)} packages have {LEAST_ROWS['train']} docstrings to learn from and "
            f"{LEAST_ROWS['test']} to test ({', '.join(enough) or 'none'}); give fewer labels, or more files to test: a corpus "
            "prepared with a higher held_out_fraction"
        )
    labels = sorted(enough[:wanted])
    rows: Rows = {split: [] for split in SPLITS}
    for row in once.values():
        if row["label"] in labels and len(text := masked(row["text"], labels)) >= TEXT_CHARACTERS[0]:
            rows[split_of[row["file"]]].append({**row, "text": text})
    return labels, rows


def masked(text: str, labels: Iterable[str]) -> str:
    """`text` without the names of any label, in whatever case, also within words: so the mask itself tells none of them."""
    longest_first = sorted(labels, key=lambda label: (-len(label), label))
    return re.sub("|".join(map(re.escape, longest_first)), MASK, text, flags=re.IGNORECASE)


def _docstrings(file: SourceFile) -> Iterator[tuple[str, str]]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            least, most = TEXT_CHARACTERS
            if len(text) >= least and text.isprintable():
                kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
                yield kind, text if len(text) <= most else text[:most].rpartition(" ")[0]


def _key(text: str) -> str:
    """What two texts that say the same have in common."""
    return " ".join(re.findall(r"\w+", text.lower()))


# --- what a function does


def summary_rows(files: Sequence[SourceFile], split_of: Mapping[str, Split]) -> Rows:
    """The rows of each split, in the order of the files."""
    rows: Rows = {split: [] for split in SPLITS}
    seen, of_file = set(), Counter()
    for file in files:
        for node in ast.walk(file.tree) if file.name in split_of else ():
            row = _summarised(node, file) if isinstance(node, Function) else None
            if row is None or of_file[file.name] >= MOST_ROWS_OF_A_FILE or (key := _key(row["document"])) in seen:
                continue
            seen.add(key)
            of_file[file.name] += 1
            rows[split_of[file.name]].append(row)
    return rows


def _summarised(node: Function, file: SourceFile) -> dict[str, str] | None:
    """A function and its docstring's first line; None where there is no such line, or nothing beside it to tell it from."""
    summary = first_sentence(ast.get_docstring(node) or "")
    if summary is None or len(node.body) < 2 or node.body[0].lineno == node.lineno:
        return None
    docstring = node.body[0]
    if node.body[1].lineno <= (docstring.end_lineno or 0):
        return None  # more than the docstring stands on its lines
    signature = file.lines[node.lineno - 1 : docstring.lineno - 1]
    body = file.lines[docstring.end_lineno : node.end_lineno]
    while body and not body[0].strip():
        body = body[1:]
    document = textwrap.dedent("\n".join((*signature, *body)))
    least, most = DOCUMENT_CHARACTERS
    if not least <= len(document) <= most or summary in document:
        return None
    parts = document.split("\n")
    return {
        "document": document,
        "summary": summary,
        "name": node.name,
        "signature": "\n".join(parts[: len(signature)]),
        "body": "\n".join(parts[len(signature) :]),
        "file": file.name,
    }


def first_sentence(docstring: str) -> str | None:
    """The docstring's first line; None where that is no sentence of its own, or shorter or longer than is of use."""
    first, *rest = docstring.split("\n")
    first = first.strip()
    ends = not rest or not rest[0].strip() or first.endswith(".")
    least, most = SUMMARY_WORDS
    is_prose = first.isprintable() and not re.search(r">>>|->|\w\(.*\)\s*($|[-:=])", first) and first[:1].isalpha()
    return first if ends and is_prose and least <= len(first.split()) <= most else None


# --- what is left behind


def mixed(rows: Rows, *, most_held_out: int | None) -> Rows:
    """The rows in an order of chance that is always the same, so that the first are as good a sample as any; of those that are
    held out so many."""
    order = {split: sorted(of, key=lambda row: _draw("\0".join(row.values()), "order")) for split, of in rows.items()}
    return {split: of if split == "train" else of[:most_held_out] for split, of in order.items()}


def _write(out: Path, tasks: Mapping[str, Rows], manifest: dict[str, Any]) -> None:
    """The whole folder appears at once, or nothing of it."""
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        for task, rows in tasks.items():
            (partial / task).mkdir(parents=True)
            for split in SPLITS:
                with json_lines(partial / task / f"{split}.jsonl") as append:
                    for row in rows[split]:
                        append(row)
        write_json(partial / MANIFEST_FILE, manifest)
        partial.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror}); nothing was kept") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _lines(
    config: StdlibTasksConfig, counts: Mapping[str, Mapping[str, int]], by_label: Mapping[str, Mapping[str, int]]
) -> list[str]:
    whose = "held out of the corpus" if config.held_out_of else "by file; a corpus of these files holds them too"
    lines = [f"{task:<16} {', '.join(f'{count:,} {split}' for split, count in of.items())}" for task, of in counts.items()]
    lines.append("labels           " + ", ".join(f"{label} {count}" for label, count in by_label["train"].items()))
    lines.append(f"test rows        {whose}; the commonest label has {max(by_label['test'].values())} of them")
    return [*lines, f"lies in          {config.out}"]
