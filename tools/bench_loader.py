"""`longhaul bench loader`: how many tokens a second one core makes ready, documents kept apart and in random order.

The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass

from conf.errors import ConfigError
from data_pipeline.config import DataConfig, SourceConfig


@dataclass(frozen=True, kw_only=True)
class LoaderBenchConfig:
    data: str = "data/stdlib"
    """Folder of a prepared corpus."""
    sequence_length: int = 1024
    """Tokens of one sample."""
    micro_batch: int = 8
    """Samples of one micro-batch."""
    document_mask: bool = True
    """Keep documents apart: positions restart, bounds are made."""
    rounds: int = 7
    """Times that the same number of micro-batches is made; the median counts."""
    round_tokens: int = 4_000_000
    """Tokens of one round."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}: must be at least 1"
            for name in ("sequence_length", "micro_batch", "rounds", "round_tokens")
            if getattr(self, name) < 1
        ]
        if problems:
            raise ConfigError(problems)


def run(config: LoaderBenchConfig) -> int:
    """Time, print, and end with a line of JSON. Raises UserError for a corpus that is not there."""
    import torch

    from data_pipeline.facts import inspect_sources
    from data_pipeline.loader import Loader

    data = DataConfig(
        sources=(SourceConfig(path=config.data),),
        sequence_length=config.sequence_length,
        document_mask=config.document_mask,
    )
    facts = inspect_sources(data)
    torch.set_num_threads(1)
    loader = Loader(data, split="train", seed=1, vocab_size=facts.vocab_size)
    per_batch = config.micro_batch * config.sequence_length
    batches = max(1, config.round_tokens // per_batch)
    rates, sample = [], 0
    for number in range(config.rounds):
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(batches):
            loader.micro_batch(list(range(sample, sample + config.micro_batch)))
            sample += config.micro_batch
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        rates.append(batches * per_batch / cpu)
        print(f"round {number + 1}/{config.rounds}: {rates[-1] / 1e6:7.2f} M tokens/s of a core ({seconds:.2f} s)", flush=True)
    report = {
        "tokens_per_second_per_core": round(statistics.median(rates)),
        "slowest": round(min(rates)),
        "tokens_per_round": batches * per_batch,
        "sequence_length": config.sequence_length,
        "document_mask": config.document_mask,
    }
    print(json.dumps(report))
    return 0
