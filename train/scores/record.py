"""What an evaluation leaves behind: evaluation.json, which says what was measured and how to measure it again, and
examples.jsonl, from which every figure of it can be computed anew. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from conf.errors import UserError

FORMAT_VERSION = 1
EVALUATION_FILE = "evaluation.json"
EXAMPLES_FILE = "examples.jsonl"
EVALUATIONS_FOLDER = "evaluations"

Kind = Literal["language", "classification", "generation", "harness"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A figure and its confidence interval, or why there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    undefined: str | None = None
    """Why `value` is None, as the end of a sentence; None where there is a value."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example: what went in, what was expected, what came out, and what that was worth."""

    id: str
    """Place in its data, such as dev.tsv:17; the same for every model."""
    source: str = ""
    """Name of its data, where there are several."""
    input: str = ""
    """Text that the model was given; of long text its beginning."""
    truths: tuple[str, ...] = ()
    """Expected outputs, any of which is right; empty: none, where the answer is that there is no answer."""
    output: str = ""
    """What the model answered; the predicted label of a classification."""
    probabilities: dict[str, float] | None = None
    """Of a classification: label -> probability, in the order of the labels."""
    loss: float | None = None
    """Nats, summed over the targets; None where nothing was scored by likelihood."""
    input_tokens: int = 0
    """Tokens that the model read."""
    target_tokens: int = 0
    """Targets that `loss` is the sum over."""
    target_bytes: int = 0
    """UTF-8 bytes of the targets' text."""
    output_tokens: int = 0
    """Tokens that the model wrote."""
    scores: dict[str, float] = field(default_factory=dict)
    """Figures of this example alone."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of one model."""

    name: str
    """Name of the task, such as language or sst2."""
    kind: Kind
    """Which figures there are."""
    model: dict[str, Any]
    """path, hash, parameters; step, tokens and run where it is a run's checkpoint."""
    data: list[dict[str, Any]]
    """name, path, hash and number of examples of each source."""
    config: dict[str, Any]
    """Resolved settings of `longhaul evaluate`."""
    scores: dict[str, Score]
    """Figure -> score; figures of one source out of several are named source/figure."""
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Name of a curve, such as reliability -> its points."""
    signatures: dict[str, str] = field(default_factory=dict)
    """Figure -> how exactly it was computed, such as sacrebleu's signature."""
    counts: dict[str, int] = field(default_factory=dict)
    """What was read and set aside: examples, targets, cut_off, ..."""
    run: dict[str, Any] = field(default_factory=dict)
    """versions, git_commit, machine, layout, seconds, created (unix seconds)."""
    folder: Path | None = None
    """Where it lies; not stored."""

    @property
    def data_hash(self) -> str:
        """One hash of all its data."""
        return " ".join(f"{entry['name']}:{entry['hash']}" for entry in self.data)

    def to_json(self) -> str:
        """Text of evaluation.json."""
        values = asdict(self)
        del values["folder"]
        return json.dumps({"format_version": FORMAT_VERSION, **values}, indent=1, ensure_ascii=False) + "\n"

    def examples(self) -> Iterator[Example]:
        """Its examples, one after another. Raises UserError for a file that is missing or damaged."""
        assert self.folder is not None, "an evaluation that was read knows its folder"
        return read_examples(self.folder / EXAMPLES_FILE)


def read_evaluation(folder: Path) -> Evaluation:
    """Read the evaluation in `folder`. Raises UserError when it is missing, damaged or of another version."""
    path = folder / EVALUATION_FILE
    try:
        values = json.loads(path.read_bytes())
        version = values.pop("format_version")
        if version != FORMAT_VERSION:
            way_out = f"remove {folder} and evaluate again"
            raise UserError(f"{path}: format_version={version}, this Longhaul reads {FORMAT_VERSION}; {way_out}")
        scores = {name: Score(**score) for name, score in values.pop("scores").items()}
        found = Evaluation(**values, scores=scores, folder=folder)
        if found.config.get("dtype") == "auto":  # of an older version, where it was bf16 on GPUs and fp32 on CPUs
            found.config["dtype"] = "bf16" if str(found.run.get("device")).startswith("cuda") else "fp32"
        return found
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the folder of an evaluation") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); remove {folder} and evaluate again") from None


def find_evaluations(root: Path) -> list[Evaluation]:
    """All whole evaluations below `root`/evaluations, oldest first; what is not finished is passed over."""
    folders = sorted((root / EVALUATIONS_FOLDER).glob(f"*/{EVALUATION_FILE}"))
    found = [read_evaluation(path.parent) for path in folders if not path.parent.name.startswith(".")]
    return sorted(found, key=lambda evaluation: evaluation.run.get("created", 0.0))


def example_line(example: Example) -> str:
    """One line of examples.jsonl; fields at their defaults are left out."""
    values = {item.name: getattr(example, item.name) for item in fields(example)}
    usual = Example(id="")
    kept = {name: value for name, value in values.items() if name == "id" or value != getattr(usual, name)}
    return json.dumps(kept, ensure_ascii=False) + "\n"


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write `path`; a file that is there is replaced."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(map(example_line, examples))


def read_examples(path: Path) -> Iterator[Example]:
    """The examples of a file that `write_examples` wrote. Raises UserError for one that is missing or damaged."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the folder of an evaluation") from None
    with file:
        for number, line in enumerate(file, start=1):
            try:
                values = json.loads(line)
                yield Example(**values | {"truths": tuple(values.get("truths", ()))})
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{path}:{number}: damaged ({error}); evaluate again") from None
