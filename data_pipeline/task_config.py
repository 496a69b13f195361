"""What a model is asked to do, or taught, and on which data: texts whose likelihood is measured, rows with a prompt and a
truth, dialogues.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Literal

from conf.errors import ConfigError

TaskKind = Literal["language", "classification", "generation", "dialogue", "preference", "harness"]
ROW_KINDS = ("classification", "generation", "dialogue", "preference")
TaskMetric = Literal["bleu", "chrf", "ter", "rouge", "answers"]
RowFormat = Literal["auto", "jsonl", "csv", "tsv", "parquet", "lines", "dataset"]


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    path: str
    """A prepared corpus, or a file; for texts also a folder or a pattern of files (.txt, .md, .jsonl, .parquet, .gz, .zst)."""
    name: str | None = None
    """Name in the results; null: the last part of the path."""
    targets: str | None = None
    """format=lines: file whose lines are the truths of the lines of `path`."""
    split: str = "train"
    """format=dataset: part of the data set that is read."""
    config: str | None = None
    """format=dataset: configuration of a data set of the hub; null: its default."""
    revision: str | None = None
    """format=dataset: commit or tag of a data set of the hub; null: the newest."""

    def __post_init__(self) -> None:
        problems = []
        if not self.path:
            problems.append("path='': needs a prepared corpus or a file")
        if self.name == "" or (self.name and "/" in self.name):
            problems.append(f"name={self.name!r}: must be a name without a slash; null takes the last part of the path")
        if problems:
            raise ConfigError(problems)

    @property
    def label(self) -> str:
        """The source's name: as given, or the path's last part."""
        return self.name if self.name is not None else Path(self.path).name or self.path


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    kind: TaskKind = "language"
    """language: the likelihood of texts; classification: the likeliest of some labels; generation: what the model writes;
    dialogue: what an assistant says; preference: which of two answers is better, for finetune; harness: of lm-eval."""
    name: str = "language"
    """Name of the task in folders and tables."""
    data: tuple[TaskSource, ...] = ()
    """Where the examples are; empty, for language: the held-out text of the run's own corpora. The folder `rows` of a
    fine-tuning run means the rows that it held out."""
    validation: tuple[TaskSource, ...] = ()
    """finetune: where the held-out rows are; empty: data.validation_fraction of the rows of `data` are held out."""
    # --- language
    split: Literal["validation", "train"] = "validation"
    """language: which part of a prepared corpus is read."""
    text_field: str = "text"
    """language: field of the text in JSONL and Parquet files."""
    context: int | None = None
    """language: most tokens that the model reads at once, the window; null: the sequence length of its run, or all that it
    can read."""
    stride: int | None = None
    """language: tokens by which the window moves, so that each target sees at least context - stride tokens before it; null:
    half of the context."""
    end_of_document: bool = True
    """language: the mark behind each document is a target too, without bytes, as in training; false: only its text is."""
    # --- rows
    format: RowFormat = "auto"
    """Of files with rows; auto: by the ending of their names. lines: a text file, one row a line, as column `text`;
    dataset: a folder that `datasets` saved (found by itself), or a name on the hub."""
    columns: tuple[str, ...] = ()
    """csv, tsv: names of the columns of files without a header; empty: the first line has them."""
    fields: dict[str, str] = field(default_factory=dict)
    """Columns under other names than the usual: {document: body, summary: abstract}; a dot goes into nested fields."""
    prompt: str = ""
    """What the model is given of a row, with its columns in braces: 'Review: {sentence}\\nSentiment:'; empty: what is usual
    for the columns that the rows have."""
    target_prefix: str | None = None
    """What stands between the prompt and what the model is to write; null: a space, or what is usual where the prompt is
    found by the columns."""
    target: str = "target"
    """Column of the truth; a dot goes into nested fields: answers.text. A list holds several truths, all of them right.
    Of rows without a column `target` the usual names are tried."""
    source_language: str | None = None
    """generation, of rows such as {translation: {en: ..., de: ...}}: language of the prompt; null: the other of two."""
    target_language: str | None = None
    """generation, of such rows: language to translate into; null: the other of two."""
    no_answer: str = "unanswerable"
    """generation, finetune: what the model learns to write for an empty list of answers. Null is no answer to a question, and
    elsewhere a row without a truth: see data.bad_rows."""
    labels: tuple[str, ...] = ()
    """classification: all labels, as the target column has them; see positive. Empty, for finetune: those of the rows."""
    label_texts: tuple[str, ...] = ()
    """classification: what the model would write for each label, behind target_prefix; empty: the label."""
    label_scores: Literal["sum", "mean_per_token", "mean_per_byte"] = "sum"
    """classification: how the likelihoods of label texts of several lengths are compared."""
    positive: str | None = None
    """classification: the label that is looked for; null: of two labels the second."""
    bins: int = 15
    """classification: bins of confidence, of the reliability curve and the calibration error."""
    metrics: tuple[TaskMetric, ...] = ()
    """generation: what the outputs are measured by; answers is exact match and token F1."""
    language: str = "en"
    """generation: of the outputs, which decides how BLEU, ROUGE and answers find words: en, de, zh, ja, ..."""
    tokenize: str | None = None
    """generation: sacrebleu's tokenizer; null: the one for the language."""
    normalization: Literal["squad", "characters"] | None = None
    """generation, of answers; squad: lower case, no punctuation, no articles; characters: each sign of Chinese or Japanese a
    word; null: by the language."""
    stem: bool = False
    """generation, of ROUGE: compare the stems of English words."""
    max_new_tokens: int = 64
    """generation: most tokens of an output."""
    stop: tuple[str, ...] = ("\\n",)
    """generation: texts at which an output ends; a spelled-out `\\n` is a line end."""
    # --- harness
    tasks: tuple[str, ...] = ()
    """harness: names of lm-eval's tasks, or of those below `include`."""
    include: str | None = None
    """harness: folder with task files of your own; lm-eval's own need their data sets at hand."""
    num_fewshot: int | None = None
    """harness: examples before each question; null: what the task says."""
    own_tasks: bool = True
    """harness: false: only the tasks below `include` are known, which saves reading ten thousand files of lm-eval."""

    def __post_init__(self) -> None:
        problems = self._language_problems() + self._row_problems()
        if not self.name or "/" in self.name or self.name.startswith("."):
            problems.append(f"name={self.name!r}: must be usable as a folder name; give letters, digits, - or _")
        labels = [source.label for source in self.data]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            problems.append(f"data: the name {', '.join(twice)} occurs more than once; give each a name of its own")
        if self.kind == "harness" and not self.tasks:
            problems.append("tasks=[]: task=harness needs the names of tasks; give task.tasks=[hellaswag,arc_easy]")
        if self.kind != "harness" and self.tasks:
            problems.append(f"tasks={list(self.tasks)}: only task=harness runs them")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            problems.append(f"num_fewshot={self.num_fewshot}: must not be negative")
        if not self.own_tasks and self.include is None:
            problems.append("own_tasks=false: leaves no task without include=FOLDER; give one of them")
        if problems:
            raise ConfigError(problems)

    def _language_problems(self) -> list[str]:
        problems = []
        if self.context is not None and self.context < 2:
            problems.append(f"context={self.context}: a window needs at least 2 tokens, one to read and one to predict")
        if self.stride is not None and self.stride < 1:
            problems.append(f"stride={self.stride}: the window must move by at least 1 token; null: half of its length")
        if self.stride is not None and self.context is not None and self.stride > self.context:
            problems.append(f"stride={self.stride}: must not exceed context={self.context}, or tokens would be left out")
        return problems

    def _row_problems(self) -> list[str]:
        problems = []
        if self.kind not in ROW_KINDS:
            return problems
        if not self.data:
            problems.append("data=[]: needs files with rows; give task.data=[{path: dev.jsonl}]")
        if self.prompt:
            problems += self._prompt_problems()
        if not self.target:
            problems.append("target='': needs the column of the truth")
        if self.kind == "preference" and self.target not in ("", "target"):
            problems.append(f"target={self.target}: a preference has two; name their columns by task.fields={{chosen: COLUMN}}")
        if self.kind == "dialogue" and self.target not in ("", "target"):
            problems.append(f"target={self.target}: a dialogue has its answers; name columns by task.fields={{output: ...}}")
        for name in ("prompt", "target_prefix", "labels", "label_texts"):
            if self.kind == "dialogue" and getattr(self, name):
                problems.append(f"{name}: a chat template writes dialogues out; leave {name} out, or give task.kind=generation")
        if self.kind == "classification":
            problems += self._label_problems()
        if any(not name or not column for name, column in self.fields.items()):
            problems.append(f"fields={self.fields}: holds an empty name; give task.fields={{document: body}}")
        if self.source_language is not None and self.source_language == self.target_language:
            problems.append(f"target_language={self.target_language}: is source_language as well; give two languages")
        if not self.no_answer:
            problems.append("no_answer='': the model needs something to write; give a text such as unanswerable")
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if "" in self.stop:
            problems.append("stop: holds an empty text, which ends every output at once; remove it")
        return problems

    def evaluation_problems(self) -> list[str]:
        """What `longhaul evaluate` needs beyond what fine-tuning does."""
        problems = []
        if self.kind == "preference":
            problems.append("kind=preference: is for finetune; score what a model writes by task=generation, with a prompt")
        if self.kind == "classification" and not self.prompt:
            problems.append("prompt='': needs what the model is given, such as 'Review: {text}\\nSentiment:'")
        if self.kind == "classification" and not self.labels:
            problems.append("labels=[]: needs at least two; give task.labels=[negative,positive]")
        if self.kind == "generation" and not self.metrics:
            problems.append("metrics=[]: needs at least one of bleu, chrf, ter, rouge, answers")
        return problems

    def _prompt_problems(self) -> list[str]:
        """Columns are named, and nothing else: Python's formats and attributes would show what is no text of the row."""
        try:
            fields = [(name, form, turned) for _, name, form, turned in Formatter().parse(self.prompt) if name is not None]
        except ValueError as error:
            return [f"prompt={self.prompt!r}: {error}; a brace that is meant is doubled: {{{{"]
        if not any(name for name, _, _ in fields):
            return [f"prompt={self.prompt!r}: names no column, so all rows would be alike; put one in braces"]
        return [
            f"prompt={self.prompt!r}: {{{name}}} is more than a column, or a field within one: {{column[field]}}; a brace that "
            "is meant is doubled"
            for name, form, turned in fields
            if form or turned or "." in name
        ]

    def _label_problems(self) -> list[str]:
        problems = []
        if not self.labels and self.label_texts:
            problems.append(f"label_texts={list(self.label_texts)}: need their labels; give task.labels=[negative,positive]")
            return problems
        if len(self.labels) == 1:
            problems.append(f"labels={list(self.labels)}: needs at least two; give task.labels=[negative,positive]")
        if len(set(self.labels)) < len(self.labels):
            problems.append(f"labels={list(self.labels)}: holds a label twice")
        if self.label_texts and len(self.label_texts) != len(self.labels):
            problems.append(f"label_texts={list(self.label_texts)}: needs one for each of the {len(self.labels)} labels")
        texts = self.label_texts or self.labels
        if "" in texts or len(set(self.label_texts)) < len(self.label_texts):
            problems.append(f"label_texts={list(texts)}: what the model would write must be different texts, none of them ''")
        return problems

    @property
    def texts_of_labels(self) -> tuple[str, ...]:
        """What the model would write for each label."""
        return tuple(f"{self.prefix_text}{text}" for text in self.label_texts or self.labels)

    @property
    def prefix_text(self) -> str:
        """The target's prefix, line ends as such."""
        return " " if self.target_prefix is None else _spelled_in(self.target_prefix)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stops, line ends as such."""
        return tuple(map(_spelled_in, self.stop))

    @property
    def prompt_text(self) -> str:
        """The prompt, line ends as such."""
        return _spelled_in(self.prompt)


def _spelled_in(text: str) -> str:
    """`text` with the line ends and tabs that a command line can only spell out."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
