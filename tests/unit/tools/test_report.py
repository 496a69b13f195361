"""The page of a run, opened in a real browser; and how it copes with runs that have little, much, or odd things to show."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from conf.compose import write_config
from conf.errors import UserError
from data_pipeline.config import DataConfig, SourceConfig
from tests.timeouts import scaled
from tools.curves import MOST_POINTS, Chart, Curve, binned, draw
from tools.history import History
from tools.report import ReportConfig, run
from tools.run_charts import make_charts
from train.config.model import ModelConfig
from train.config.pretrain import PretrainConfig
from train.config.training import BudgetConfig
from train.metrics.goodput import Goodput
from train.metrics.record import encode
from train.outcome import Outcome, write_outcome

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TINY = ModelConfig(
    family="gpt2", num_layers=2, hidden_size=32, num_heads=2, ffn_size=64, max_positions=64, vocab_size=300,
    positions="learned", norm="layer", mlp="gelu", bias=True, tied_head=True,
)  # fmt: skip


def run_folder(folder: Path, records: list[dict] | None) -> Path:
    """A run's folder as training leaves it, without checkpoints."""
    folder.mkdir(parents=True)
    config = PretrainConfig(
        model=TINY,
        data=DataConfig(sources=(SourceConfig(path=str(folder / "gone")),), sequence_length=64),
        budget=BudgetConfig(steps=99),
    )
    write_config(config, folder / "config.yaml")
    (folder / "run.json").write_text(json.dumps({"run_id": "r1", "wandb_id": "w1", "created": 1.0, "versions": {"torch": "2"}}))
    if records is not None:
        (folder / "metrics.jsonl").write_bytes(b"".join(encode(record) for record in records))
    return folder


def eventful() -> list[dict]:
    """Two attempts, a rollback, a skipped step, a spike, an evaluation and norms."""
    goodput, records = Goodput(), []
    steps = [(1, step) for step in range(1, 31)] + [(2, step) for step in range(21, 41)] + [(2, step) for step in range(36, 61)]
    for number, (attempt, step) in enumerate(steps):
        goodput.add("productive", 1.0)
        if number == 30:
            goodput.lose(10.0)
            goodput.add("restart", 5.0)
        loss = float("nan") if step == 39 else 900.0 if step == 50 else 5.0 - step / 20
        record = {
            "kind": "train", "step": step, "attempt": attempt, "tokens": 64 * step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0,
            "skipped": int(step == 39), "spike": int(step == 50), "tokens_per_second": 100.0, "memory_gib": 1.0, "time": 10.0,
            "norm/weight.blocks.0": 3.0, "norm/exp_avg": 0.1, **goodput.fields(),
        }  # fmt: skip
        records.append(record)
        if step % 20 == 0:
            records.append({"kind": "evaluation", "step": step, "loss": 5.2 - step / 20, "attempt": attempt, "time": 10.0})
    return records


def opened(page: Path, folder: Path) -> tuple[str, list[str], set[str]]:
    """The page as the browser has it, what its console said, and the addresses that were asked for beside the page's own."""
    log = folder / "net.json"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}", "--virtual-time-budget=2000", "--dump-dom",
        page.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=scaled(60), check=True)
    # What the page itself asks for has an origin; the browser asks its maker for this and that besides.
    wanted = (
        line for line in log.read_text().splitlines() if '"initiator":' in line and '"initiator":"not an origin"' not in line
    )
    asked = {address for line in wanted for address in re.findall(r'"url":"([^"]*)"', line)}
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return result.stdout, console, asked


def test_what_happened_is_read_off_the_records(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", eventful())
    history = History.read(folder / "metrics.jsonl")
    assert history.restarts == [21] and history.rollbacks == [40]
    assert history.steps_again == 10 + 5
    assert history.last["step"] == 60 and history.column("loss")[0].tolist() == list(range(1, 61))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", eventful())
    write_outcome(folder, Outcome(attempt=1, state="crashed", reason="rank 1 <was> ended by SIGKILL", next=""))
    assert run(ReportConfig(run=str(folder))) == 0
    page = folder / "report" / "index.html"
    document, console, asked = opened(page, tmp_path)
    assert console == [] and asked == set()
    assert document.count("<svg") == len(list(page.parent.glob("*.png"))) >= 7
    assert "rank 1 &lt;was&gt; ended by SIGKILL" in document
    assert "values above" in document and "are cut off" in document, "one loss of 900 must not flatten the others"
    ids = re.findall(r'\bid="([^"]+)"', document)
    assert len(ids) == len(set(ids)), "charts inlined into one page must not share ids"
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text), "nothing is loaded from outside"
    assert "<script" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_broken_page_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text('<script>undefinedName()</script><img src="https://example.invalid/x.png">')
    _, console, asked = opened(page, tmp_path)
    assert any("undefinedName" in line for line in console)
    assert asked == {"https://example.invalid/x.png"}


@pytest.mark.parametrize("records", [None, [], eventful()[:1]], ids=["no metrics", "empty metrics", "one step"])
def test_a_run_that_has_hardly_begun(tmp_path: Path, records: list[dict] | None) -> None:
    folder = run_folder(tmp_path / "run", records)
    assert run(ReportConfig(run=str(folder), out=str(tmp_path / "out"))) == 0
    assert "<h1>Run run</h1>" in (tmp_path / "out" / "index.html").read_text()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("config.yaml: cannot be read")):
        run(ReportConfig(run=str(tmp_path)))


def test_sources_and_probes_have_their_curves(tmp_path: Path) -> None:
    records = eventful()
    for step in (20, 40):
        of_all = next(record for record in records if record["kind"] == "evaluation" and record["step"] == step)
        of_all |= {"probe/copying": step / 100, "probe/copying_gain": 3.0, "probe/brackets": 0.5}
        records += [{**of_all, "name": name, "loss": of_all["loss"] - 1} for name in ("code", "prose")]
    history = History.read(run_folder(tmp_path / "run", records) / "metrics.jsonl")
    charts = {chart.name: chart for chart in make_charts(history)}
    labels = [curve.label for curve in charts["loss"].curves]
    assert labels == ["training", "held out", "held out: code", "held out: prose"]
    probes = {curve.label: curve for curve in charts["probes"].curves}
    assert list(probes) == ["copying", "brackets", "copying by chance", "brackets by chance"]
    assert probes["copying"].steps == [20, 40] and probes["copying"].values == [20.0, 40.0]
    assert np.allclose(probes["brackets by chance"].values, 100 / 3) and set(probes["copying by chance"].values) == {0.0}
    assert [curve.values for curve in charts["probe_gains"].curves] == [[3.0, 3.0]]
    assert history.best_held_out == (pytest.approx(2.2), 60, ""), "that of all sources, not the easiest one's"
    assert "probes" not in {
        chart.name for chart in make_charts(History.read(run_folder(tmp_path / "b", eventful()) / "metrics.jsonl"))
    }


def test_a_million_steps_are_binned_with_their_range() -> None:
    values = np.sin(np.arange(1_000_000) / 1e5)
    values[123_456] = 7.0
    values[7] = np.nan
    data = binned(np.arange(1_000_000), values)
    assert len(data.means) == MOST_POINTS
    assert data.highs.max() == 7.0 and np.isfinite(data.means).all()
    assert (data.lows <= data.means).all() and (data.means <= data.highs).all()
    assert abs(data.means.mean() - np.nanmean(values)) < 1e-4


def test_a_chart_without_a_finite_value(tmp_path: Path) -> None:
    chart = Chart(name="loss", title="loss", unit="", curves=[Curve(label="x", steps=[1, 2], values=[float("nan")] * 2)])
    assert draw(chart, tmp_path).startswith("<svg")
