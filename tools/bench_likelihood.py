"""`longhaul bench likelihood`: log-likelihood requests by our model of lm-eval and by its own `hf`, on the same weights.

Both get the same texts in turns, in one process; the answers are compared. `hf` is timed at several batch sizes, and its best
one counts. The last line is JSON.
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, UserError

TOLERANCE = 1e-3  # relative, of a log-likelihood


@dataclass(frozen=True, kw_only=True)
class LikelihoodBenchConfig:
    hf: str = "exported/quickstart"
    """Folder of a Hugging Face model, such as an export."""
    requests: int = 1000
    """Requests of each kind and round."""
    choices: int = 4
    """Continuations of each question, of the kind `choices`."""
    rounds: int = 3
    """Times that each is measured; the first pair warms up and is not counted."""
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Of `hf`: rows of a batch."""
    batch_tokens: int | None = None
    """Of ours: tokens of a batch; null: as `longhaul evaluate` takes."""
    processes: int = 1
    """Of ours: processes that share out the requests and the cores, as with `longhaul evaluate`."""
    shots: int = 0
    """Examples before each question, the same before all, of the kind `choices`."""
    seed: int = 0
    """Seed of the choice of texts."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}: must be at least 1"
            for name in ("requests", "choices", "rounds", "processes")
            if getattr(self, name) < 1
        ]
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            problems.append(f"batch_sizes={list(self.batch_sizes)}: needs at least one, each at least 1")
        if self.shots < 0:
            problems.append(f"shots={self.shots}: must not be negative")
        if problems:
            raise ConfigError(problems)


def run(config: LikelihoodBenchConfig) -> int:
    """Time, compare, print, and end with a line of JSON. Raises UserError where `hf` of lm-eval cannot be had."""
    if not Path(config.hf).is_dir():
        raise UserError(f"hf={config.hf}: no such folder; bash tools/quickstart.sh leaves one, or longhaul export makes it")
    import torch
    from lm_eval.api.instance import Instance

    from train.harness.model import LonghaulLM

    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"{error.name}: is missing, without which lm-eval has no `hf`; pip install 'lm-eval[hf]'") from None
    logging.disable(logging.WARNING)
    threads = torch.get_num_threads()
    ours = LonghaulLM(hf=config.hf, dtype="fp32", device="cpu", batch_tokens=config.batch_tokens, processes=config.processes)
    theirs = HFLM(pretrained=config.hf, dtype="float32", device="cpu", batch_size=1)
    report: dict[str, Any] = {}
    for kind, pairs in kinds_of(config).items():
        asked = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number) for number, pair in enumerate(pairs)
        ]

        def by_us(asked: list[Instance] = asked) -> list[tuple[float, bool]]:
            return ours.loglikelihood(asked, disable_tqdm=True)

        def by_hf(size: int, asked: list[Instance] = asked) -> list[tuple[float, bool]]:
            theirs.batch_size_per_gpu = size
            shared = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                return theirs.loglikelihood(asked, disable_tqdm=True)
            finally:
                torch.set_num_threads(shared)

        if ours.context.is_first:
            report[kind] = _measure(config, kind, by_us, by_hf)
        else:  # a copy of this command, which does its part of ours alone
            for _ in range(config.rounds + 1):
                by_us()
    report |= {"requests": config.requests, "threads": threads, "processes": config.processes}
    print(json.dumps(report))
    return 0


def _measure(
    config: LikelihoodBenchConfig, kind: str, by_us: Callable[[], list], by_hf: Callable[[int], list]
) -> dict[str, float]:
    ours: list[float] = []
    theirs: dict[int, list[float]] = {size: [] for size in config.batch_sizes}
    worst = 0.0
    for number in range(config.rounds + 1):
        found, seconds = _timed(by_us)
        ours.append(seconds)
        for size, times in theirs.items():
            expected, seconds = _timed(lambda: by_hf(size))  # noqa: B023
            times.append(seconds)
            worst = max(worst, _difference(found, expected))
        told = "   ".join(f"hf, {size} rows {times[-1]:6.2f} s" for size, times in theirs.items())
        print(
            f"{kind}, round {number}{' (not counted)' if not number else ''}: longhaul {ours[-1]:6.2f} s   {told}", flush=True
        )
    median = statistics.median(ours[1:])
    best = min(theirs, key=lambda size: statistics.median(theirs[size][1:]))
    their_median = statistics.median(theirs[best][1:])
    if worst > TOLERANCE:
        raise UserError(f"{kind}: the answers differ by {worst:.2e} relative; one of the two computes another model")
    return {
        "longhaul_seconds": round(median, 3),
        "hf_seconds": round(their_median, 3),
        "hf_batch_size": best,
        "times_as_fast": round(their_median / median, 2),
        "largest_difference": worst,
    }


def _timed(work: Callable[[], list]) -> tuple[list, float]:
    started = time.perf_counter()
    found = work()
    return found, time.perf_counter() - started


def _difference(found: Sequence[tuple[float, bool]], expected: Sequence[tuple[float, bool]]) -> float:
    """Largest relative difference of the log-likelihoods."""
    return max(abs(one[0] - other[0]) / max(1.0, abs(other[0])) for one, other in zip(found, expected, strict=True))


def kinds_of(config: LikelihoodBenchConfig) -> dict[str, list[tuple[str, str]]]:
    """(context, continuation) of each request: lone ones, and several behind one question; from the standard library."""
    draw = random.Random(config.seed)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    lines = [
        line
        for path in files
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(line.strip()) > 15
    ]

    def some(count: int) -> str:
        start = draw.randrange(len(lines) - count)
        return "\n".join(lines[start : start + count])

    lone = [(some(draw.randrange(1, 8)) + "\n", some(1)) for _ in range(config.requests)]
    shots = "".join(f"{some(2)}\n\n" for _ in range(config.shots))
    choices: list[tuple[str, str]] = []
    while len(choices) < config.requests:
        question = shots + some(draw.randrange(2, 6)) + "\n"
        choices += [(question, some(1).strip()[: draw.randrange(8, 40)]) for _ in range(config.choices)]
    return {"lone": lone, "choices": choices[: config.requests]}
