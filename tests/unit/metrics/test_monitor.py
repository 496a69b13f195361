"""The whole of it: what the loop gives, and what the writers get."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.errors import ConfigError
from train.config.monitor import MonitorConfig, WandbConfig
from train.metrics import Metrics, NullMetrics, RunIdentity, Throughput, read_metrics

QUIET = MonitorConfig(tensorboard=False, wandb=WandbConfig(mode="disabled"))


def identity(attempt: int = 1) -> RunIdentity:
    return RunIdentity(
        name="first",
        run_id="r",
        wandb_id="w",
        attempt=attempt,
        job_type="pretrain",
        group="g",
        resolved_config={"model": {"hidden_size": 8}},
        layout={"zero": 1},
    )


def test_a_run_with_a_rollback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    throughput = Throughput(flops_per_token=10.0, flops_per_token_causal=5.0, peak_flops=100_000.0)
    first = Metrics(QUIET, tmp_path, identity(1), 10, throughput=throughput)
    for step in (1, 2, 3, 4):
        first.train({"step": step, "tokens": step * 1000, "samples": step, "loss": 1.0 / step, "step_seconds": 0.5})
    first.evaluation({"step": 4, "loss": 0.2})
    first.close("crashed")
    second = Metrics(QUIET, tmp_path, identity(2), 10)
    for step in (3, 4):
        second.train({"step": step, "tokens": step * 1000, "samples": step, "loss": 9.0, "step_seconds": 0.25})
    second.close("stopped", "time limit")
    second.close("finished")
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["kind"], r["step"], r["attempt"]) for r in records] == [
        ("train", 1, 1),
        ("train", 2, 1),
        ("train", 3, 2),
        ("train", 4, 2),
        ("evaluation", 4, 1),
    ]
    assert records[0]["tokens_per_second"] == 2000.0
    assert (records[0]["mfu"], records[0]["mfu_causal"]) == (0.2, 0.1)
    assert "tokens_per_second" not in records[2], "nothing to count a resumed run's first step from"
    assert records[3]["tokens_per_second"] == 4000.0 and "mfu" not in records[3]
    assert records[4]["tokens"] == 4000, "an evaluation stands at the tokens of its step"
    assert records[0]["memory_gib"] > 0
    out = capsys.readouterr().out
    assert "step  1/10" in out and "step  4/10  40.0%  evaluation" in out
    assert "warn: run stopped: first, attempt 2: time limit" in out and "finished" not in out


def test_all_writers_work_side_by_side(tmp_path: Path) -> None:
    metrics = Metrics(MonitorConfig(wandb=WandbConfig(mode="disabled")), tmp_path, identity(), 1)
    metrics.train({"step": 1, "tokens": 10, "loss": 1.0})
    metrics.close("finished")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_the_other_ranks_report_nothing() -> None:
    metrics = NullMetrics()
    metrics.train({"step": 1})
    metrics.evaluation({"step": 1})
    metrics.alert("a", "b", level="error")
    metrics.close("finished")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"init_timeout_seconds": 0}, "init_timeout_seconds=0: must be above 0"),
        ({"finish_timeout_seconds": -1}, "finish_timeout_seconds=-1: must be above 0"),
        ({"project": ""}, "project=''"),
        ({"tags": ("a" * 65,)}, "1 to 64 characters"),
    ],
)
def test_settings_that_cannot_be(settings: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        WandbConfig(**settings)


def test_a_console_that_never_prints_is_refused() -> None:
    with pytest.raises(ConfigError, match="console_every_steps=0"):
        MonitorConfig(console_every_steps=0)
