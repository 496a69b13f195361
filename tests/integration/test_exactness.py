"""A run that is stopped, killed and resumed is the undisturbed run, to the bit; and the comparison that says so can fail."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.dist import run_ranks
from tests.integration import faults
from tests.integration.runs import EVALUATE_EVERY, STEPS, WORDS, attempt, settings
from tests.timeouts import scaled
from tools.chaos import chaos
from tools.chaos_faults import MEANING
from tools.exactness import differences
from train.checkpoint.manifest import published, unpublished
from train.metrics.jsonl import read_metrics
from train.plan import make_plan

pytestmark = pytest.mark.further

SLOW_KINDS = ("hang", "stopped_rank")
STOP = 7  # neither a save's step nor an evaluation's, and within the batch ramp


def whole_run(corpus: Path, run_dir: Path, *, ranks: int = 1, change: Callable[[], None] | None = None, **options) -> Path:
    endings = run_ranks(attempt, ranks, settings(corpus, **options), str(run_dir), 1, change)
    assert endings == [("finished", STEPS)] * ranks
    return run_dir


def resumed_run(corpus: Path, run_dir: Path, *, ranks: int = 1, change: Callable[[], None] | None = None, **options) -> Path:
    stopping = settings(corpus, stop_at_step=STOP, **options)
    assert run_ranks(attempt, ranks, stopping, str(run_dir), 1, change) == [("stopped", STOP)] * ranks
    endings = run_ranks(attempt, ranks, settings(corpus, **options), str(run_dir), 2, change)
    assert endings == [("finished", STEPS)] * ranks
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, ZeRO 1."""
    return whole_run(corpus, tmp_path_factory.mktemp("undisturbed") / "run")


RESUMED = [
    (1, 2, "bf16"), (2, 2, "fp32"), (3, 2, "fp32"), pytest.param(3, 2, "bf16", marks=pytest.mark.campaign(name="resume")),
]  # fmt: skip


@pytest.mark.parametrize(("zero", "ranks", "precision"), RESUMED)
def test_a_resumed_run_is_the_undisturbed_run(corpus: Path, tmp_path: Path, zero: int, ranks: int, precision: str) -> None:
    options = {"zero": zero, "precision": precision, "ranks": ranks}
    reference = whole_run(corpus, tmp_path / "whole", **options)
    assert differences(reference, resumed_run(corpus, tmp_path / "resumed", **options)) == []
    records = read_metrics(reference / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, STEPS + 1))
    assert len([record for record in records if record["kind"] == "evaluation"]) == STEPS // EVALUATE_EVERY
    assert len({record["batch"] for record in records if record["kind"] == "train"}) == 2, "the batch grew"


@pytest.mark.campaign(name="resume")
@pytest.mark.parametrize("mistake", faults.MISTAKES, ids=lambda mistake: mistake.__name__)
def test_every_mistake_of_a_resume_is_noticed(corpus: Path, tmp_path: Path, mistake: Callable[[], None]) -> None:
    """The program with the mistake is compared with itself, so that only what the resume does can differ."""
    reference = whole_run(corpus, tmp_path / "whole", change=mistake)
    found = differences(reference, resumed_run(corpus, tmp_path / "resumed", change=mistake))
    steps = [int(match[1]) for line in found if (match := re.search(r": train of step (\d+): ", line))]
    assert min(steps) in (STOP + 1, STOP + 2), "the first step after the resume, or the first that its weights are used in"
    assert any(line.startswith("exp_avg of ") for line in found)


@pytest.mark.campaign(name="resume")
def test_a_guard_that_is_forgotten_is_noticed(corpus: Path, tmp_path: Path) -> None:
    reference = whole_run(corpus, tmp_path / "whole", change=faults.guard_forgotten)
    found = differences(reference, resumed_run(corpus, tmp_path / "resumed", change=faults.guard_forgotten))
    assert len(found) == 1 and found[0].startswith("state.json: ")


def test_a_resume_costs_the_same_at_any_step(corpus: Path, tmp_path: Path) -> None:
    """From step 10 and from step 1,000,000 as many batches are made and as many samples looked up before the next step."""
    run_dir = tmp_path / "run"
    stopping = settings(corpus, stop_at_step=STOP)
    assert run_ranks(attempt, 1, stopping, str(run_dir), 1) == [("stopped", STOP)]
    endless = settings(corpus, steps=2_000_000)
    early, late = (run_ranks(work_of_a_resume, 1, endless, str(run_dir), step)[0] for step in (10, 10**6))
    assert 8 <= early <= 20 and 8 <= late <= 20, "a batch of 8 and what is made ahead, not the samples before it"


def work_of_a_resume(context: Any, config: Any, run_dir: str, step: int) -> int:
    """How many samples a run that is resumed at `step` has looked up when it has done one step more."""
    from data_pipeline.sampler import Sampler
    from train.attempt import Attempt
    from train.metrics import NullMetrics
    from train.stages.training import build
    from train.state import TrainState

    looked_up = []
    locate, from_plain = Sampler.locate, TrainState.from_plain

    def counted(self: Any, ids: Any) -> Any:
        looked_up.extend(ids)
        return locate(self, ids)

    def moved(raw: Any) -> Any:
        return from_plain({**raw, "step": step, "samples": 8 * step, "tokens": 8 * 32 * step})

    Sampler.locate, TrainState.from_plain = counted, staticmethod(moved)
    one = Attempt(run_dir=Path(run_dir), number=2)
    trainer = build(config, context, one, NullMetrics(), plan=make_plan(config, context.world_size))
    steps = trainer.steps()
    next(steps)
    assert trainer.state.step == step + 1
    steps.close()
    return len(looked_up)


@pytest.mark.parametrize("death", faults.DEATHS, ids=lambda death: death.__name__)
def test_a_death_inside_a_save_does_no_harm(corpus: Path, tmp_path: Path, undisturbed: Path, death: Callable[[], None]) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(AssertionError, match=re.escape("exit codes [-9]")):
        run_ranks(attempt, 1, settings(corpus), str(run_dir), 1, death)
    assert unpublished(run_dir / "checkpoints"), "it died with a folder half written or half removed"
    assert run_ranks(attempt, 1, settings(corpus), str(run_dir), 2) == [("finished", STEPS)]
    assert differences(undisturbed, run_dir) == []
    assert unpublished(run_dir / "checkpoints") == [], "what the death left is gone"


def test_a_manifest_that_comes_first_is_noticed(corpus: Path, tmp_path: Path, undisturbed: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(AssertionError, match=re.escape("exit codes [-9]")):
        run_ranks(attempt, 1, settings(corpus), str(run_dir), 1, faults.manifest_published_first)
    # Such a folder calls itself a checkpoint. It is found out at the load, and the one before it is taken.
    assert run_ranks(attempt, 1, settings(corpus), str(run_dir), 2) == [("finished", STEPS)]
    assert [path.name for path in (run_dir / "checkpoints/quarantined").iterdir() if path.is_dir()] == ["step-00000010.1"]
    assert differences(undisturbed, run_dir) == []


@pytest.mark.parametrize("field", ["loss", "lr", "grad_norm", "target_tokens", "samples"])
def test_a_changed_record_is_noticed(undisturbed: Path, tmp_path: Path, field: str) -> None:
    copy = Path(shutil.copytree(undisturbed, tmp_path / "copy"))
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    value = lines[1][field]
    lines[1][field] = value + 1 if isinstance(value, int) else math.nextafter(value, math.inf)
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = differences(undisturbed, copy)
    assert len(found) == 1 and f": {field} is " in found[0]


def test_a_missing_record_is_noticed(undisturbed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(undisturbed, tmp_path / "copy"))
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:3] + lines[4:]))
    assert len(differences(undisturbed, copy)) == len(differences(copy, undisturbed)) == 1


def test_a_changed_bit_of_a_checkpoint_is_noticed(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(undisturbed, tmp_path / "copy"))
    path = published(copy / "checkpoints")[-1] / "rank-00000.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("exp_avg_sq/"))
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]] ^= 1
    path.write_bytes(content)
    assert any("SHA-256 differs" in line for line in differences(undisturbed, copy)), "the file is not what was written"
    monkeypatch.setattr("train.checkpoint.stored.check_files", lambda *_: None)
    kind, _, logical = name.partition("/")
    assert differences(undisturbed, copy) == [f"{kind} of {logical}: 1 of {tensors[name].numel():,} elements differ"]


@pytest.mark.parametrize(
    ("zero", "faults", "kinds"),
    [
        (1, 3, "machine,rank_in_save,flipped_byte"),
        pytest.param(
            3, 10, ",".join(kind for kind in MEANING if kind not in SLOW_KINDS), marks=pytest.mark.campaign(name="faults")
        ),
        pytest.param(2, 2, "hang,stopped_rank", marks=pytest.mark.campaign(name="faults")),
    ],
)
def test_a_run_that_meets_faults_ends_as_the_undisturbed_one(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], zero: int, faults: int, kinds: str
) -> None:
    campaign = (
        f"faults={faults}",
        f"kinds=[{kinds}]",
        "seed=2",
        f"patience_seconds={scaled(180)}",
        f"folder={tmp_path / 'campaign'}",
    )
    guard = ("guard.diverged_after_skips=3", "guard.leave_out_steps_before=0", "checkpoint.keep_last=3")
    settings = (
        *WORDS,
        "budget.steps=60",
        f"parallel=zero{zero}",
        "launch.processes=2",
        f"watchdog.step_seconds={scaled(5)}",
        *guard,
    )
    code = chaos([*campaign, *settings, f"data.sources=[{{path: {corpus}}}]"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert f"equal to the bit after {faults} faults" in printed
