"""The arithmetic of the benches, and that each runs on something tiny and ends with a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.command import longhaul
from tools.bench_step import make_report
from tools.cli import main
from tools.verbs import BENCHES

TINY = (
    "model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "model.ffn_size=64", "model.vocab_size=320",
)  # fmt: skip
# fp32, since each round measures a product of matrices, in bf16 the dearest of all where a CPU has to emulate it.
SHORT = ("rounds=1", "block_steps=2", "kernels.compile=false", "sequence_length=32", "micro_batch=2", "precision=fp32")


def test_report_by_hand() -> None:
    """100 tokens a step; the loop takes 1.02 times its step in two of three quiet rounds, the peer twice as long."""
    times = {
        "loop": [[1.02, 1.02], [1.02, 1.02], [9.0, 9.0]],
        "step": [[1.0, 1.0], [1.0, 1.0], [9.0, 9.0]],
        "deepspeed": [[0.5, 0.5], [1.0, 1.0], [9.0, 9.0]],
        "hf": [[2.04, 2.04], [2.04, 2.04], [18.0, 18.0]],
    }
    report = make_report(times, [1000.0, 1000.0, 10.0], tokens=100, flops_per_token=(5, 4), processes=1)
    assert report["loop_overhead"] == pytest.approx(0.02)
    assert report["wrapper_overhead"] == pytest.approx(0.0)
    assert report["times_hf"] == pytest.approx(2.0)
    assert report["ways"]["step"] == {
        "tokens_per_second": 100.0, "step_ms_p50": 1000.0, "step_ms_p95": 9000.0, "tflops": 0.0, "mfu": 0.5, "mfu_causal": 0.4,
    }  # fmt: skip


def test_no_way_is_faster_than_the_peak() -> None:
    """On two ranks 100 tokens of 50 FLOP in 0.5 s are 10,000 FLOP/s, of 20 FLOP 4,000; the products gave 2 x 2,500 once."""
    report = make_report({"loop": [[1.0]], "step": [[0.5]]}, [200.0, 2500.0], tokens=100, flops_per_token=(50, 20), processes=2)
    assert [(way["mfu"], way["mfu_causal"]) for way in report["ways"].values()] == [(0.5, 0.4), (1.0, 0.8)]


# The peer's compiler writes C++, which takes as long as all the rest; the campaign has it.
NO_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}


def bench(*words: str, environment: Mapping[str, str] = NO_COMPILER) -> tuple[str, dict]:
    """What the command printed, and the JSON of its last line."""
    done = longhaul("bench", *words, environment=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_step_runs_and_traces(corpus: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    text, report = bench("step", f"data={corpus}", "trace=true", f"trace_file={trace}", *TINY, *SHORT, "peer=hf")
    assert set(report["ways"]) == {"loop", "step", "deepspeed", "hf", "hf_compiled"}
    assert all(way["tokens_per_second"] > 0 for way in report["ways"].values())
    assert json.loads(trace.read_text())["traceEvents"]
    assert "collective" in text


def test_loader_and_checkpoint_run(corpus: Path, tmp_path: Path) -> None:
    _, loaded = bench("loader", f"data={corpus}", "rounds=1", "round_tokens=4096", "sequence_length=32")
    assert loaded["tokens_per_second_per_core"] > 0
    _, saved = bench("checkpoint", f"folder={tmp_path}", "rounds=1", *TINY)
    assert saved["bytes"] > 0 and not list(tmp_path.iterdir())


@pytest.mark.further
def test_startup_separates_its_parts(corpus: Path, tmp_path: Path) -> None:
    text, report = bench("startup", f"data={corpus}", "repeats=0", "large_model=llama_tiny", f"folder={tmp_path}")
    parts = report["parts"]
    assert list(parts) == ["corpus check", "corpus again", "first engine", "build", "values", "publish", "load"]
    # llama_tiny with the corpus's vocabulary: all of it is drawn by one rank, and 12 bytes of each are read twice.
    assert parts["build"]["values"] == parts["values"]["values"] > 10_000
    assert parts["load"]["bytes"] == pytest.approx(24 * parts["values"]["values"], rel=0.2)
    of_8b, of_70b = report["extrapolated"]["llama_8b"], report["extrapolated"]["llama_70b"]
    # 8.03 and 70.55 billion weights over 8 and 64 ranks
    assert of_70b["values seconds"] / of_8b["values seconds"] == pytest.approx(70.55 / 8.03 / 8, rel=0.05)
    assert "llama_70b on 64 ranks" in text and not list(tmp_path.iterdir())


@pytest.mark.campaign(name="benches")
def test_step_runs_on_two_ranks(corpus: Path) -> None:
    text, report = bench("step", f"data={corpus}", *TINY, *SHORT, "processes=2")
    assert report["tokens_per_step"] == 2 * 2 * 32 and text.count("round 1/1") == 1


@pytest.mark.campaign(name="benches")
def test_step_runs_beside_a_compiled_peer(corpus: Path) -> None:
    _, report = bench("step", f"data={corpus}", *TINY, *SHORT, "peer=hf", environment={})
    assert report["ways"]["hf_compiled"]["tokens_per_second"] > 0


def test_a_bench_that_is_not_there() -> None:
    done = longhaul("bench", "speed")
    assert done.returncode == 93
    assert "there is: longhaul bench attention | checkpoint | likelihood | loader | startup | step" in done.stderr


@pytest.mark.parametrize("what", sorted(BENCHES))
def test_each_bench_has_its_own_help(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", what, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"bench {what}" in shown and ("block_steps" in shown) == (what == "step")
