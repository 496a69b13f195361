"""`longhaul inspect` of a real run: it shows what a step read, and says so when the corpus is no longer that."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conf.compose import write_config
from conf.errors import UserError
from data_pipeline.ledger import parse_ranges
from tests.dist import run_ranks
from tests.integration.runs import attempt, settings
from tools.inspect_step import InspectConfig, run
from train.metrics.jsonl import read_metrics

pytestmark = pytest.mark.further

STEP = 3


@pytest.fixture
def trained(corpus: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Folder of a run of four steps, and of its own copy of the corpus."""
    copied, run_dir = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(corpus, copied)
    config = settings(copied, steps=4)
    assert run_ranks(attempt, 2, config, str(run_dir), 1) == [("finished", 4)] * 2
    write_config(config, run_dir / "config.yaml")
    return run_dir, copied


def test_the_samples_of_a_step(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, copied = trained
    record = next(line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train" and line["step"] == STEP)
    samples = [sample for start, end in parse_ranges(str(record["sample_ranges"])) for sample in range(start, end)]
    assert run(InspectConfig(run=str(run_dir), step=STEP)) == 0
    printed = capsys.readouterr().out
    assert all(f"\nsample {sample}, source " in printed for sample in samples)
    assert f"data             is what the step read (hash {record['data_hash']})" in printed
    assert run(InspectConfig(run=str(run_dir), step=STEP, sample=samples[1])) == 0
    printed = capsys.readouterr().out
    assert f"sample {samples[1]}, " in printed and f"sample {samples[0]}, " not in printed
    with pytest.raises(UserError, match=r"sample=999999: is not of step 3"):
        run(InspectConfig(run=str(run_dir), step=STEP, sample=999999))
    with pytest.raises(UserError, match=r"step=77: .* has no such step"):
        run(InspectConfig(run=str(run_dir), step=77))


def test_a_corpus_that_has_changed(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Same size, same manifest, other tokens: every token moved by one place."""
    run_dir, copied = trained
    for shard in copied.glob("train-*.bin"):
        tokens = shard.read_bytes()
        shard.write_bytes(tokens[2:] + tokens[:2])
    assert run(InspectConfig(run=str(run_dir), step=STEP)) == 1
    assert "IS NOT what the step read, whose hash is " in capsys.readouterr().out
