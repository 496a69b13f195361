"""Runs on a real Slurm, from `submit` to the finished model, and the same words on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slurm.history import Begin
from slurm.verdict import read_reports
from tests.integration import finetuning
from tests.slurm.conftest import Desk, nodes_of, settle, slowly
from tests.timeouts import scaled
from tools.exactness import differences
from train.checkpoint.manifest import published

pytestmark = pytest.mark.further

PLACES = {"zero1": [], "tensor2": ["parallel.tensor=2"]}


@pytest.mark.parametrize("layout", ["zero1", pytest.param("tensor2", marks=pytest.mark.campaign(name="slurm"))])
def test_two_nodes_do_what_one_machine_does(desk: Desk, layout: str) -> None:
    """The same words, by srun on two nodes and by the local supervisor: the same lines of metrics.jsonl, the same weights."""
    there = desk.submit("there", *PLACES[layout])
    here = desk.submit("here", *PLACES[layout], "cluster.tasks_per_node=2", site="this_machine", nodes=1)
    for unit in (there, here):
        desk.wait_finished(unit)
        assert (unit / "FINISHED").exists()
    assert differences(here, there) == []
    begin = next(event for event in desk.history(there).events if isinstance(event, Begin))
    assert begin.nodes == ("n1", "n2")
    assert len(list((there / "logs/attempt-01").glob("rank-*.log"))) == 2
    assert sorted(path.stem for path in (there / "logs/attempt-01/preflight").glob("*.json")) == ["n1", "n2"]
    report = read_reports(there / "logs/attempt-01/preflight")["n2"]
    assert (report.all_reduce_gb_per_second or 0.0) > 0.0 and (report.bandwidth_gb_per_second or 0.0) > 0.0
    assert report.clock_offset_seconds is not None and abs(report.clock_offset_seconds) < 1.0
    status = desk.call("status", sites=False).text
    for name in ("there", "here"):
        line = next(line for line in status.splitlines() if line.startswith(name))
        assert "finished" in line and "16/16" in line


def test_a_signal_by_hand_saves_and_requeues(desk: Desk) -> None:
    slowly(desk)
    unit = desk.submit("poked", "budget.steps=40", "checkpoint.every_steps=1000")
    desk.wait_for_step(unit, 5)
    (job,) = desk.cluster.queue()
    desk.cluster.call("scancel", "--signal=USR1", "--batch", job)
    desk.wait(lambda: len(desk.history(unit).ends) == 1, "the stop")
    desk.cluster.mend()
    desk.wait_finished(unit)
    assert [end.reason for end in settle(desk, unit)][0] == "received SIGUSR1"


def test_a_node_that_is_lost(desk: Desk) -> None:
    """Its daemon dies while its rank lives on: Slurm requeues the job on other nodes, and no step is done twice or left out."""
    slowly(desk)
    unit = desk.submit("unlucky", "budget.steps=150", "checkpoint.every_steps=10")
    desk.wait_for_step(unit, 15)
    desk.cluster.kill_node("n2")
    try:
        desk.wait(lambda: len(nodes_of(desk, unit)) == 2, "the second attempt")
        desk.cluster.mend()
        desk.wait_finished(unit)
        assert "n2" in nodes_of(desk, unit)[0] and "n2" not in nodes_of(desk, unit)[1]
        first = desk.history(unit).ends[0]
        lines = [json.loads(line) for line in (unit / "metrics.jsonl").read_text().splitlines()]
        newest = {line["step"]: line["attempt"] for line in lines if line["kind"] == "train"}
        assert list(newest) == list(range(1, 151)) and sorted(newest.values()) == list(newest.values())
        assert first.action == "leave" and ("the scheduler ended the job" in first.reason or "cut off" in first.reason)
    finally:
        desk.cluster.bring_back("n2")


def test_a_rank_that_hangs(desk: Desk) -> None:
    """The watchdog names the host; the next attempt goes on without it."""
    desk.cluster.break_node("n2", "hang:7")
    unit = desk.submit("stuck", f"watchdog.step_seconds={scaled(4)}", f"watchdog.grace_seconds={scaled(1)}")
    desk.wait_finished(unit)
    first, last = settle(desk, unit)
    assert (first.state, first.action, first.suspects) == ("crashed", "again", ("n2",))
    assert "rank 1 on n2" in first.reason
    first_nodes, next_nodes = nodes_of(desk, unit)
    assert "n2" in first_nodes and "n2" not in next_nodes
    assert last.state == "finished"


@pytest.mark.campaign(name="slurm")
def test_a_fine_tuning_does_on_two_nodes_what_it_does_on_one_machine(desk: Desk, tmp_path: Path) -> None:
    base, rows = finetuning.base(tmp_path / "base", desk.corpus), finetuning.labelled_file(tmp_path)
    data = ["task=classification", f"task.data=[{{path: {rows}}}]", "data.sequence_length=32", "data.validation_fraction=0.2"]
    size = ["batch.sequences=8", "batch.micro_batch=2", "budget.epochs=null", "budget.steps=6", "evaluate.every_steps=3"]
    words = [f"checkpoint={base}", *data, *size, "precision=fp32", "monitor=quiet"]
    places = {"there": ["cluster=here", "nodes=2"], "here": ["cluster=this_machine", "cluster.tasks_per_node=2"]}
    for name, place in places.items():
        done = desk.call("submit", "finetune", *words, f"run.name={name}", *place)
        assert done.code == 0, done.text
    there, here = (desk.folder / "runs" / name for name in places)
    for unit in (there, here):
        desk.wait_finished(unit)
    assert differences(here, there) == []
    assert (there / "outputs/step-00000006.jsonl").read_bytes() == (here / "outputs/step-00000006.jsonl").read_bytes()


@pytest.mark.campaign(name="slurm")
def test_a_corpus_a_model_and_its_export_one_after_the_other(desk: Desk, tmp_path: Path) -> None:
    """An array prepares, a run waits for it and trains, an export waits for the run."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(6):
        (text / f"{number}.txt").write_text("\n".join(f"line {line} of file {number}" for line in range(400)))
    corpus = ["corpus=text", f"corpus.paths=[{text}]", "output=data/made", "tokenizer.vocab_size=300", "held_out_fraction=0.2"]
    words = [*corpus, "corpus.document_separator=null"]
    done = desk.call("submit", "prepare", *words, "parts=2", "name=made", "cluster=here")
    assert done.code == 0, done.text
    unit = desk.submit("model", "data.sources=[{path: data/made}]", "after=[made]")
    done = desk.call(
        "submit", "export", "checkpoint=runs/model", "out=exported", "after=[model]", "cluster=here", "proof_sequences=2"
    )
    assert done.code == 0, done.text
    desk.wait_finished(desk.folder / "runs/export-exported", 300.0)
    assert (desk.folder / "exported/model.safetensors").exists()
    assert step_names(unit) == ["step-00000015", "step-00000016"]
    status = desk.call("status", "run=made", sites=False).text
    assert status.count("finished: exit code 0") == 6, status


def step_names(unit: Path) -> list[str]:
    return [path.name for path in published(unit / "checkpoints")]
