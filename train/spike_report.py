"""The report of a loss spike: which samples the step read, the loss of each, their documents and text, the layers' norms."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.loader import SampleSource
from train.checkpoint.manifest import write_durably
from train.config.settings import RunSettings
from train.engine import Engine, StepResult
from train.health.windows import sample_at
from train.parallel import ParallelContext
from train.state import TrainState

MOST_REPORTS = 20  # of an attempt: each costs some passes over the batch
TEXT_CHARACTERS = 2000


@dataclass(kw_only=True)
class SpikeReporter:
    """Writes `spike-step-NNNNNNNN.json` into the attempt's folder; all ranks take part."""

    config: RunSettings
    context: ParallelContext
    loader: SampleSource
    tokenizer_folder: Path
    folder: Path
    num_written: int = 0

    def write(self, engine: Engine, state: TrainState, result: StepResult, *, first: int, lr: float) -> str:
        """Report the step that read the positions from `first` to `state.samples`; returns where, for a person."""
        wanted = self.config.guard.report_samples
        if not wanted or self.num_written >= MOST_REPORTS:
            return "no report (guard.report_samples)" if not wanted else f"no report after {MOST_REPORTS} of them"
        self.num_written += 1
        losses = self._losses(engine, [sample_at(place, state.left_out) for place in range(first, state.samples)])
        norms = engine.norms()
        path = self.folder / f"spike-step-{state.step:08d}.json"
        if self.context.is_first:
            worst = sorted(losses, key=lambda sample: -losses[sample] if math.isfinite(losses[sample]) else -math.inf)
            report = {
                "step": state.step,
                "loss": repr(result.loss),
                "grad_norm": repr(result.grad_norm),
                "learning_rate": lr,
                "losses_before": state.guard.losses[-16:],
                "samples": [self._sample(sample, losses[sample]) for sample in worst[:wanted]],
                "loss_of_every_sample_after_the_update": {str(sample): repr(loss) for sample, loss in losses.items()},
                "norms": norms,
            }
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_durably(path, json.dumps(report, indent=1, ensure_ascii=False).encode())
            except OSError as error:
                return f"its report could not be written ({path}: {error.strerror})"
        return f"see {path}"

    def _losses(self, engine: Engine, samples: list[int]) -> dict[int, float]:
        """Mean loss of every sample, each alone, after the update; in micro-batches of the usual shape, all of one sample."""
        ranks, rank = self.context.data_parallel, self.context.data_rank
        size, mine = self.config.batch.micro_batch, []
        for sample in samples[rank::ranks]:
            found = engine.evaluate(self.loader.micro_batch([sample] * size))
            mine.append((sample, found.loss_sum / max(1, found.target_tokens)))
        gathered = [pair for part in self.context.gather_to_all(mine) for pair in part]
        return dict(sorted(gathered))

    def _sample(self, sample: int, loss: float) -> dict[str, Any]:
        from data_pipeline.tokenizer import Tokenizer

        text = Tokenizer(self.tokenizer_folder).decode(self.loader.micro_batch([sample]).tokens.tolist())
        return {
            "sample": sample,
            "loss_after_the_update": repr(loss),
            "source": self.loader.source_of(sample),
            "documents": self.loader.describe(sample),
            "text": text[:TEXT_CHARACTERS],
        }
