"""`longhaul pretrain` where `precision=auto` is settled by the ranks: told, recorded, and changed by a resume elsewhere."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command import longhaul
from tests.dist import run_ranks
from tests.integration.runs import WORDS, settings
from train.checkpoint.reader import CheckpointReader
from train.parallel import ParallelContext
from train.precision import WITHOUT_BF16, Cpu, bf16_on_cpu

WITHOUT = {"ATEN_CPU_CAPABILITY": "avx2"}  # such a machine computes in fp32, whatever its CPU has


@dataclass(frozen=True, kw_only=True)
class Moved:
    texts: dict[str, str]
    records: dict[str, dict]
    checkpoint: CheckpointReader


@pytest.fixture(scope="module")
def story(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Moved:
    """A run begun in bf16, continued where only fp32 makes sense, and taken back."""
    folder = tmp_path_factory.mktemp("runs")
    words = [word for word in WORDS if not word.startswith("precision=")]
    common = [*words, f"data.sources=[{{path: {corpus}}}]", f"run.folder={folder}", "run.name=moved", "evaluate.max_samples=0"]
    texts, records = {}, {}
    for name, more in {
        "begun": ["precision=bf16", "budget.stop_at_step=4"],
        "continued": ["budget.stop_at_step=8"],
        "back": ["precision=bf16"],
    }.items():
        done = longhaul("pretrain", *common, *more, environment=WITHOUT)
        assert done.returncode == (85 if "budget.stop_at_step" in more[-1] else 0), done.stdout + done.stderr
        texts[name] = done.stdout
        records[name] = json.loads((folder / "moved/run.json").read_text())
    return Moved(texts=texts, records=records, checkpoint=CheckpointReader(sorted(folder.glob("moved/checkpoints/step-*"))[-1]))


def test_it_is_told_with_the_reason(story: Moved) -> None:
    assert "ZeRO 1, bf16 (as asked)" in story.texts["begun"] and "precision        bf16 (as asked)" in story.texts["begun"]
    reason = "ATEN_CPU_CAPABILITY=avx2 restricts this CPU" if bf16_on_cpu(environment={})[0] else "only emulates bf16"
    assert reason in story.texts["continued"] and "ZeRO 1, fp32 (auto: " in story.texts["continued"]


def test_emulated_bf16_is_told_with_the_measured_ratio(story: Moved) -> None:
    told = story.texts["begun"].count("bf16 is emulated here: ")
    # A CPU that has the instructions uses them all the same: PyTorch was loaded before the variable was set.
    assert told == 1 or (told == 0 and bf16_on_cpu(environment={})[0])
    assert told == story.texts["begun"].count(" times as fast; precision=auto takes fp32")
    assert "bf16 is emulated" not in story.texts["continued"]


def test_a_resume_takes_the_answer_of_its_machine_and_records_it(story: Moved) -> None:
    assert "; bf16 until step 4\n" in story.texts["continued"] and "; fp32 until step 8\n" in story.texts["back"]
    assert [record["precision"] for record in story.records.values()] == ["bf16", "fp32", "bf16"]
    assert story.records["continued"]["precision_reason"].startswith("auto: ")
    found = [change for change in story.checkpoint.state["adjustments"] if change["field"] == "precision"]
    assert found == [
        {"step": 4, "field": "precision", "before": "bf16", "after": "fp32"},
        {"step": 8, "field": "precision", "before": "fp32", "after": "bf16"},
    ]


def test_a_checkpoint_holds_what_was_computed_in(story: Moved) -> None:
    assert story.checkpoint.config.precision == "bf16"


def differently(context: ParallelContext) -> str:
    """Two ranks on two kinds of machine."""
    from train.rank import settle_precision

    flags = {"avx2", "avx512_bf16"} if context.rank == 1 else {"avx2"}
    for variable in WITHOUT_BF16:
        os.environ.pop(variable, None)
    Cpu.of_this_machine = staticmethod(lambda: Cpu(machine="x86_64", flags=frozenset(flags)))
    config = settings(Path("corpus"), precision="auto")
    try:
        return settle_precision(config, context, ["old-node", "new-node"]).precision
    except ValueError as error:
        return str(error)


def test_ranks_that_answer_differently_all_refuse() -> None:
    (first, second) = run_ranks(differently, 2)
    assert first == second and first.startswith("precision=auto: is fp32 on old-node and bf16 on new-node")
