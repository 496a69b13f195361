"""The proofs that a user can run say yes to the program, and no to the program with a mistake in it, and name what differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from conf.errors import ConfigError, UserError
from tests.integration.mutant import MODULE
from tests.integration.runs import WORDS
from tests.timeouts import scaled
from tools import chaos, verify_resume
from tools.chaos import ChaosConfig
from tools.verify_resume import VerifyConfig, judge, spread
from train.metrics.record import encode

pytestmark = pytest.mark.further

STEPS = 8
# Below the campaign's patience, or it could not tell a rank that hangs from one that takes its time.
DEADLINES = [f"watchdog.{phase}_seconds={scaled(60)}" for phase in ("startup", "step", "evaluate", "save")]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Call it with the name of the mistake that the ranks shall have; the tests themselves are not installed."""

    def chosen(mistake: str) -> None:
        monkeypatch.setenv("LONGHAUL_MISTAKE", mistake)
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))

    return chosen


def words(corpus: Path, *more: str) -> tuple[str, ...]:
    return (*WORDS, f"data.sources=[{{path: {corpus}}}]", "launch.processes=2", *more)


@pytest.mark.campaign(name="resume")
def test_a_resumed_run_is_verified(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = words(corpus, f"steps={STEPS}", f"folder={tmp_path / 'runs'}", "parallel=zero2")
    assert verify_resume.verify_resume(settings) == 0
    assert "VERIFIED: the resumed run is the undisturbed run, to the bit" in capsys.readouterr().out


@pytest.mark.campaign(name="resume")
@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("moments_not_restored", "exp_avg of "),
        ("guard_forgotten", "state.json: "),
        ("samples_shifted_by_one", "metrics.jsonl: train of step 5: data_hash is"),
    ],
)
def test_verify_resume_notices_a_mistake(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mutate: Callable[[str], None], mistake: str, named: str
) -> None:
    mutate(mistake)
    config = VerifyConfig(overrides=words(corpus), steps=STEPS, folder=str(tmp_path / "runs"))
    assert verify_resume.run(config, module=MODULE) == 1
    printed = capsys.readouterr().out
    assert "FAILED: the resumed run is not the undisturbed run" in printed and named in printed


@pytest.mark.campaign(name="resume")
@pytest.mark.parametrize(
    ("mistake", "kind", "named"),
    [
        ("moments_not_restored", "machine", "metrics.jsonl: train of step "),
        ("guard_forgotten", "rank", "state.json: "),
        ("manifest_before_the_files", "machine_in_save", "no checkpoint can be used"),
    ],
)
def test_chaos_notices_a_mistake(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mutate: Callable[[str], None],
    mistake: str,
    kind: str,
    named: str,
) -> None:
    mutate(mistake)
    settings = words(corpus, "budget.steps=30", *DEADLINES)
    config = ChaosConfig(
        overrides=settings, faults=1, kinds=(kind,), bad_data=False, folder=str(tmp_path / "runs"), patience_seconds=scaled(180)
    )
    assert chaos.run(config, module=MODULE) == 1
    printed = capsys.readouterr().out
    assert "FAILED: " in printed and named in printed


def recorded(folder: Path, *losses: float) -> Path:
    folder.mkdir()
    lines = [
        {"kind": "train", "step": step, "attempt": 1, "time": 0.0, "loss": loss, "grad_norm": 1.0}
        for step, loss in enumerate(losses, start=1)
    ]
    (folder / "metrics.jsonl").write_bytes(b"".join(encode(line) for line in lines))
    return folder


def test_on_a_machine_that_does_not_repeat_itself_the_noise_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = recorded(tmp_path / "first", 3.0, 2.5, 2.0)
    second = recorded(tmp_path / "second", 3.0, 2.501, 2.0)
    near = recorded(tmp_path / "near", 3.0, 2.5, 2.002)
    far = recorded(tmp_path / "far", 3.0, 2.5, 2.1)
    short = recorded(tmp_path / "short", 3.0, 2.5)
    assert spread(first, second)["loss"] == pytest.approx(0.001)
    assert judge(first, second, near) == 0
    assert "within 3 times the noise" in capsys.readouterr().out
    assert judge(first, second, far) == 1
    assert "beyond 3 times the noise of undisturbed runs: loss" in capsys.readouterr().out
    assert judge(first, second, short) == 1


def test_settings_that_verify_nothing_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps=2: must be at least 4"):
        VerifyConfig(steps=2)
    with pytest.raises(ConfigError, match="patience_seconds=0: must be above 0"):
        VerifyConfig(patience_seconds=0)
    with pytest.raises(UserError, match="steps=99: the run has 16; lower steps, or raise budget.steps"):
        verify_resume.verify_resume(words(corpus, "steps=99", f"folder={tmp_path / 'runs'}"))
    with pytest.raises(UserError, match="exists already"):
        verify_resume.verify_resume(words(corpus, "steps=8", f"folder={tmp_path}"))
