"""`longhaul bench attention`: what it prints, what it counts, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from tests.parity.attention_truth import relative_error
from tools.attention_timing import cut, inputs, visible_pairs
from tools.bench_attention import BenchConfig
from tools.cli import EXIT_USER_ERROR, main
from train.model.attention import Needs

SMALL = ["bench", "attention", "sequence_length=32", "batch=2", "heads=4", "kv_heads=2", "head_size=16", "repeats=1"]


def needs_of(config: BenchConfig) -> Needs:
    return Needs(
        num_heads=config.heads,
        kv_heads=config.kv_heads or config.heads,
        head_size=config.head_size,
        sequence_length=config.sequence_length,
        packed=config.documents is not None,
        window=config.window,
        scale=0.25,
    )


def test_prints_a_table_and_a_line_of_json(capsys: pytest.CaptureFixture) -> None:
    assert main([*SMALL, "documents=3", "window=9", "dtype=bf16"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert set(report["backends"]) == {"sdpa", "sdpa_flash", "eager"} and report["auto"] == "eager"
    assert report["cannot"]["flash3"] == "needs a CUDA device, not cpu"
    assert any(line.startswith("eager* ") for line in table) and any("flash3 " in line for line in table)
    for figures in report["backends"].values():
        assert 0 < figures["output_error"] < 1e-2 and 0 < figures["gradient_error"] < 1e-2
        assert figures["forward_ms"] > 0 and figures["both_tflops"] > 0


def test_times_what_is_named(capsys: pytest.CaptureFixture) -> None:
    assert main([*SMALL, "backends=[reference]", "softcap=5", "dtype=fp32"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(report["backends"]) == ["reference"] and report["backends"]["reference"]["output_error"] < 1e-7


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([*SMALL, "backends=[flash2]"], "kernels.attention=flash2: needs a CUDA device, not cpu; use kernels.attention=auto"),
        ([*SMALL, "backends=[auto]"], "backends: auto is no backend of its own"),
        ([*SMALL, "kv_heads=3"], "kv_heads=3: must divide heads=4"),
        ([*SMALL, "documents=33"], "documents=33: must not exceed sequence_length=32"),
        ([*SMALL, "softcap=0"], "softcap=0.0: must be above 0; null is none"),
        ([*SMALL, "repeats=0"], "repeats=0: must be at least 1"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_refuses(words: list[str], text: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == EXIT_USER_ERROR
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("documents", [None, 1, 4])
def test_counts_the_pairs_that_are_seen(window: int | None, documents: int | None) -> None:
    config = BenchConfig(sequence_length=16, batch=3, heads=2, head_size=8, window=window, documents=documents)
    bounds, rows_TKGD = inputs(config, needs_of(config))
    assert bounds.dtype == torch.int32 and len(bounds) == 3 * (documents or 1) + 1
    assert {0, 16, 32, 48} <= set(bounds.tolist()) and bounds.diff().min() > 0
    seen = 0
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        seen += sum(min(token - start + 1, window or 16) for token in range(start, end))
    assert visible_pairs(needs_of(config), bounds) == seen
    query_TND, key_TKD, value_TKD = cut(rows_TKGD)
    assert query_TND.shape == key_TKD.shape == value_TKD.shape == (48, 2, 8)
    assert relative_error(query_TND, key_TKD) > 1
