"""The arithmetic of the benches, and that each runs on something tiny and ends with a line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


END = "--- the end of a command ---"
# Commands one after another, each in a fork of a process that has imported torch and DeepSpeed once. The peer is compiled
# without the generation of C++, which is torch's own and takes as long as all the rest.
SEVERAL = """
import functools, json, os, sys, torch
import train.stages.pretrain
from tools.cli import main
torch.compile = functools.partial(torch.compile, backend="aot_eager")
end, commands = json.loads(sys.argv[1])
for words in commands:
    child = os.fork()
    if not child:
        code = main(["bench", *words])
        print(end, flush=True)
        os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"{words[0]} failed")
"""


def benches(*commands: tuple[str, ...]) -> list[tuple[str, dict]]:
    """What each command printed, and the JSON of its last line."""
    command = [sys.executable, "-P", "-c", SEVERAL, json.dumps((END, commands))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    texts = [text.strip() for text in done.stdout.split(END)[:-1]]
    return [(text, json.loads(text.splitlines()[-1])) for text in texts]


def test_benches_run(corpus: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    (text, report), (_, loaded), (_, saved) = benches(
        ("step", f"data={corpus}", "trace=true", f"trace_file={trace}", *TINY, *SHORT, "peer=hf"),
        ("loader", f"data={corpus}", "rounds=1", "round_tokens=4096", "sequence_length=32"),
        ("checkpoint", f"folder={tmp_path}", "rounds=1", *TINY),
    )
    assert set(report["ways"]) == {"loop", "step", "deepspeed", "hf", "hf_compiled"}
    assert all(way["tokens_per_second"] > 0 for way in report["ways"].values())
    assert json.loads(trace.read_text())["traceEvents"]
    assert "collective" in text
    assert loaded["tokens_per_second_per_core"] > 0
    assert saved["bytes"] > 0 and list(tmp_path.iterdir()) == [trace]


@pytest.mark.thorough
def test_step_runs_on_two_ranks(corpus: Path) -> None:
    """By the command line itself, of which the second rank is a copy."""
    command = [sys.executable, "-P", "-m", "tools.cli", "bench", "step", f"data={corpus}", *TINY, *SHORT, "processes=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["tokens_per_step"] == 2 * 2 * 32
    assert done.stdout.count("round 1/1") == 1


def test_a_bench_that_is_not_there() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tools.cli", "bench", "speed"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 93
    assert "there is: longhaul bench attention | checkpoint | likelihood | loader | startup | step" in done.stderr


@pytest.mark.parametrize("what", sorted(BENCHES))
def test_each_bench_has_its_own_help(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", what, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"bench {what}" in shown and ("block_steps" in shown) == (what == "step")
