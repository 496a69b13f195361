"""What a model is measured by on its way: the loss on the held-out text, of all of it and of each source, and the probes.

Sums are taken over all targets and divided once. When to measure, and whether to stop in between, is the loop's matter.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from data_pipeline.loader import Loader, MicroBatch
from train.config.settings import RunSettings
from train.engine import Engine
from train.metrics import Value
from train.parallel import ParallelContext
from train.probes import Probe, make_probes

ROWS = 16  # sequences of a probe's batch come in multiples of it, as products of 8-bit floats want
LEAST_TOKENS = 2048  # of a probe's batch: with the micro-batches of a tiny run, starting the kernels would be all the time
COUNTED_TOKENS = 2**17  # of the held-out text, to know the frequent ones
LARGEST_EXPONENT = 700.0  # of a perplexity that a float holds
Group = TypeVar("Group")
BeforeBatch = Callable[[int], None]


class Evaluator:
    """Measures the model of `engine`; all ranks together. It draws no random number and leaves nothing changed."""

    def __init__(self, config: RunSettings, *, context: ParallelContext, engine: Engine, loader: Loader) -> None:
        """loader: of the held-out text. `missing` says which probes cannot be had, and why."""
        self.config, self.context, self.engine, self.loader = config, context, engine, loader
        self.outputs: tuple[()] = ()
        self.micro_batch = config.evaluate.micro_batch or config.batch.micro_batch
        self.probes, self.missing = make_probes(
            config.evaluate.probes,
            loader.tokenizer_folder,
            counts_V=self._count_ids() if config.evaluate.probes else np.empty(0),
            sequence_length=config.sequence_length,
        )

    def run(self, before_batch: BeforeBatch) -> list[dict[str, Value]]:
        """One record for all the held-out text, with the probes; in a run of several sources, one for each that has any.

        `before_batch` is called with the batch's number, on all ranks alike; what it raises ends the evaluation.
        """
        started = time.perf_counter()
        numbers = itertools.count()
        sources = self.loader.held_out_samples(self.config.evaluate.max_samples)
        sums = torch.zeros(len(sources), 3, dtype=torch.float64)  # loss in nats, targets, UTF-8 bytes of the targets
        for source, batch, counts in self._held_out_batches(sources):
            before_batch(next(numbers))
            result = self.engine.evaluate(batch, compiled=len(batch.sample_ids) == self.micro_batch)
            if counts:
                sums[source] += torch.tensor([result.loss_sum, result.target_tokens, batch.target_bytes], dtype=torch.float64)
        sums = self.context.sum_over_data(sums.to(self.context.device)).cpu()
        probes_started = time.perf_counter()
        answers = self._run_probes(lambda: before_batch(next(numbers)))
        ended = time.perf_counter()
        whole: dict[str, Value] = {**_figures(*sums.sum(dim=0).tolist()), "seconds": ended - started, **answers}
        if answers:
            whole["probe_seconds"] = ended - probes_started
        parts = [{"name": name, **_figures(*part)} for name, part in zip(sources, sums.tolist(), strict=True) if part[1]]
        return [whole, *parts] if len(self.loader.names) > 1 else [whole]

    def criterion(self, records: Sequence[Mapping[str, Value]]) -> float:
        """The loss on all the held-out text."""
        return float(records[0]["loss"])

    def _count_ids(self) -> np.ndarray:
        """[V] how often each id occurs in some of the held-out text, of all sources."""
        most = -(-COUNTED_TOKENS // self.config.sequence_length)
        counts_V = np.zeros(self.config.model.vocab_size, dtype=np.int64)
        for numbers in self.loader.held_out_samples(most).values():
            for first in range(0, len(numbers), ROWS):
                tokens_T = self.loader.micro_batch(numbers[first : first + ROWS]).tokens.numpy()
                counts_V += np.bincount(tokens_T, minlength=len(counts_V))
        return counts_V

    def _held_out_batches(self, sources: dict[str, range]) -> Iterator[tuple[int, MicroBatch, bool]]:
        """This rank's batches: the number of the source, the batch, of this source alone, and whether it counts."""
        size = self.micro_batch
        groups = [
            (index, chosen[first : first + size])
            for index, chosen in enumerate(sources.values())
            for first in range(0, len(chosen), size)
        ]
        for (index, chosen), counts in shared_out(groups, self.context):
            yield index, self.loader.micro_batch(chosen), counts

    def _run_probes(self, before_batch: Callable[[], None]) -> dict[str, Value]:
        """Share of right answers of each probe; where one id is right, its loss, and how much less that is than at first."""
        sums = torch.zeros(len(self.probes), 4, dtype=torch.float64)  # questions, right answers, loss in nats, loss at first
        for index, probe in enumerate(self.probes):
            rows, total = self._probe_rows(probe), len(probe.tokens_NS)
            groups = [(first, min(first + rows, total)) for first in range(0, total, rows)]
            for (first, last), counts in shared_out(groups, self.context):
                before_batch()
                found = self._answers_of(probe.of(first, last), rows)
                if counts:
                    sums[index] += found
        sums = self.context.sum_over_data(sums.to(self.context.device)).tolist()
        figures: dict[str, Value] = {}
        for probe, (questions, right, loss, at_first) in zip(self.probes, sums, strict=True):
            figures[f"probe/{probe.name}"] = right / questions
            if probe.first_place_P is not None:
                figures[f"probe/{probe.name}_loss"] = loss / questions
                figures[f"probe/{probe.name}_gain"] = (at_first - loss) / questions
        return figures

    def _answers_of(self, probe: Probe, rows: int) -> torch.Tensor:
        """[4] of some sequences, as they are summed up. They are filled up to `rows`, so that all batches are of one shape."""
        tokens_NS = torch.from_numpy(probe.tokens_NS)
        tokens_BS = torch.cat([tokens_NS, tokens_NS[:1].expand(rows - len(tokens_NS), -1)])
        places = [probe.place_P] if probe.first_place_P is None else [probe.place_P, probe.first_place_P]
        starts_P, options_PO = probe.sequence_P * tokens_BS.shape[1], torch.from_numpy(probe.options_PO)
        places_P = torch.from_numpy(np.concatenate([starts_P + place_P for place_P in places]))
        answers = self.engine.ask(tokens_BS, places_P, options_PO.repeat(len(places), 1))
        questions = len(probe.place_P)
        log_probability_PO, at_first_PO = np.split(answers.log_probability.double().numpy(), [questions])
        right = probe.score(log_probability_PO, answers.likeliest[:questions].numpy()).sum()
        losses = (-log_probability_PO[:, 0].sum(), -at_first_PO[:, 0].sum()) if len(places) > 1 else (0.0, 0.0)
        return torch.tensor([questions, right, *losses], dtype=torch.float64)

    def _probe_rows(self, probe: Probe) -> int:
        """Sequences of a batch: as many tokens as of the held-out text, no more than there are, and even over tensor ranks."""
        total, length = probe.tokens_NS.shape
        step = math.lcm(ROWS, self.context.tensor.size)
        tokens = max(LEAST_TOKENS, self.micro_batch * self.config.sequence_length)
        return step * min(max(1, tokens // (length * step)), -(-total // step))


def shared_out(groups: Sequence[Group], context: ParallelContext) -> Iterator[tuple[Group, bool]]:
    """This rank's groups, and whether each counts: every rank gets equally many, as ZeRO 3 needs."""
    ranks, rank = context.data_parallel, context.data_rank
    for index in range(-(-len(groups) // ranks)):
        mine = index * ranks + rank
        yield groups[min(mine, len(groups) - 1)], mine < len(groups)


def _figures(loss_sum: float, targets: float, target_bytes: float) -> dict[str, Value]:
    loss = loss_sum / targets if targets else math.nan
    figures: dict[str, Value] = {"loss": loss, "perplexity": math.exp(min(loss, LARGEST_EXPONENT))}
    if target_bytes:  # labels have none
        figures["bits_per_byte"] = loss_sum / math.log(2) / target_bytes
    return figures | {"target_tokens": int(targets)}
