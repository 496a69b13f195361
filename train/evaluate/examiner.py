"""What a model that is fine-tuned is measured by on its way: the loss of the held-out rows, and its task's own figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from conf.errors import UserError
from data_pipeline.encoded_rows import EncodedRows
from data_pipeline.tokenizer import Tokenizer
from train.config.finetune import OF_THE_LOSS, FinetuneConfig
from train.engine import Engine
from train.evaluate.checks import score_settings
from train.evaluate.engines import Engines
from train.evaluate.labels import tell_labels
from train.evaluate.rows import write_rows
from train.held_out import BeforeBatch, Evaluator
from train.inference.text_model import TextModel
from train.metrics import Value
from train.metrics.record import Output
from train.model.transformer import Decoder
from train.parallel import ParallelContext
from train.scores.direction import direction
from train.scores.record import Example, Kind
from train.scores.sheet import example_scores, tallies
from train.scores.tally import plain_figures

Records: TypeAlias = list[dict[str, Value]]


class TaskExaminer:
    """Measures the model of `engine`; all ranks together. It draws no random number and leaves nothing changed."""

    def __init__(
        self,
        config: FinetuneConfig,
        *,
        context: ParallelContext,
        engine: Engine,
        held_out: Evaluator,
        rows: EncodedRows,
    ) -> None:
        """held_out: of the loss. Raises UserError for a metric that the task does not have."""
        self.config, self.context, self.engine, self.held_out = config, context, engine, held_out
        labels = config.task.kind == "classification"
        self.rows = rows.validation_rows(config.scored_rows)
        self.outputs: tuple[Output, ...] = ()
        self.text = TextModel(
            model=config.model,
            tokenizer=Tokenizer(rows.tokenizer_folder),
            opening=rows.opening,
            endings=rows.endings,
        )
        self._inputs = _labelled_inputs(rows, len(self.rows)) if labels else []
        self.metric = config.metric
        self._settings = score_settings(config.task_of(rows.labels))
        self._kind: Kind = "classification" if labels else "generation"
        self._check_metric()

    def run(self, before_batch: BeforeBatch) -> Records:
        """One record: the loss, and the figures of the task."""
        numbers = itertools.count()
        records = self.held_out.run(lambda _: before_batch(next(numbers)))
        if self.rows:
            with self.engine.whole() as decoder:
                ask = self._label if self.config.task.kind == "classification" else self._write
                examples = ask(decoder, lambda _: before_batch(next(numbers)))
            records[0] |= {f"task/{name}": value for name, value in self._figures(examples).items()}
            self.outputs = tuple(self._output(example) for example in examples)
        return records

    def criterion(self, records: Sequence[Mapping[str, Value]]) -> float:
        """The metric, turned so that lower is better."""
        name = self.metric if self.metric in OF_THE_LOSS else f"task/{self.metric}"
        return -direction(self.metric) * float(records[0][name])

    def _check_metric(self) -> None:
        """Before the first step, by what right answers to the rows would give."""
        labels = self.text.model.labels
        right = [
            Example(
                id=row.id,
                source=row.source,
                input=row.prompt,
                truths=row.truths,
                output="".join(row.truths[:1]),
                probabilities={label: float(label in row.truths) for label in labels} or None,
                input_tokens=0,
            )
            for row in self.rows
        ]
        known = [*OF_THE_LOSS, *(name for name in (self._figures(right) if right else ()) if direction(name))]
        if self.metric not in known:
            what = "this task" if self.rows else "this task, as scoring.max_rows=0 measures the loss alone"
            raise UserError(f"scoring.metric={self.metric}: is no figure of {what}; there are {', '.join(known)}")

    def _figures(self, examples: Sequence[Example]) -> dict[str, float]:
        """Those of the whole; per label and per source they are in `longhaul evaluate`."""
        figures = plain_figures(tallies(self._kind, examples, self._settings)[""])
        return {name: value for name, value in figures.items() if "[" not in name and name not in ("loss", "perplexity")}

    def _label(self, decoder: Decoder, progress: BeforeBatch) -> list[Example]:
        return tell_labels(self.rows, self._inputs, self._engines(decoder), progress=progress)

    def _write(self, decoder: Decoder, progress: BeforeBatch) -> list[Example]:
        engines = self._engines(decoder)
        none = [()] * len(self.rows)  # the loss of the truths is measured already
        task = self.config.task_of(())
        return write_rows(self.rows, none, task, self.text, engines=engines, progress=progress).examples

    def _engines(self, decoder: Decoder) -> Engines:
        return Engines(decoder, self.text, self.context, batch_tokens=self.config.scoring.batch_tokens)

    def _output(self, example: Example) -> Output:
        return Output(
            id=example.id,
            input=example.input,
            truth=" | ".join(example.truths),
            output=example.output,
            scores=example_scores(self._kind, example, self._settings),
        )


def _labelled_inputs(rows: EncodedRows, count: int) -> list[np.ndarray]:
    """What the model reads of the first held-out rows, as it lies in their file."""
    arrays = rows.arrays("validation")
    bounds = arrays.row_starts_R1[: count + 1].tolist()
    return [arrays.tokens_N[first:last] for first, last in itertools.pairwise(bounds)]
