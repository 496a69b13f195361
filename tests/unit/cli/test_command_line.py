"""The dispatcher: words to a verb, and what a wrong word, a closed pipe or an interrupt end in."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.timeouts import scaled
from tools import cli
from tools.cli import VERBS, Verb, main

COMMAND = [sys.executable, "-P", "-m", "tools.cli"]
SEEN: list[tuple[list[str], str | None]] = []


def remember(overrides: list[str], config_dir: str | None) -> int:
    """A verb that only keeps what it was given."""
    SEEN.append((overrides, config_dir))
    return 7


def interrupted(overrides: list[str], config_dir: str | None) -> int:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def fake_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    SEEN.clear()
    common = {"summary": "a test's own", "root": "prepare", "schema": "data_pipeline.config:PrepareConfig"}
    verbs = {**VERBS, "remember": Verb(function=f"{__name__}:remember", **common)}
    verbs["interrupted"] = Verb(function=f"{__name__}:interrupted", **common)
    monkeypatch.setattr(cli, "VERBS", verbs)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a=1", "b=2"], (["a=1", "b=2"], None)),
        (["--config-dir", "/x", "a=1"], (["a=1"], "/x")),
        (["a=1", "--config-dir=/x"], (["a=1"], "/x")),
        (["~a", "+b=1", "++c=2"], (["~a", "+b=1", "++c=2"], None)),
        (["a=-1", "b=--x"], (["a=-1", "b=--x"], None)),
    ],
)
def test_words_reach_the_verb(words: list[str], expected: tuple) -> None:
    assert main(["remember", *words]) == 7
    assert [expected] == SEEN


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["pretrian"], "longhaul pretrian: no such verb. Did you mean pretrain? `longhaul --help` lists the verbs\n"),
        (["xyzzy"], "longhaul xyzzy: no such verb. `longhaul --help` lists the verbs\n"),
        (["--hepl"], "longhaul --hepl: no such verb. `longhaul --help` lists the verbs\n"),
        (["plan", "--dry-run"], "longhaul plan: --dry-run: no such option; settings are given as name=value, see --help\n"),
        (["plan", "--config-dir"], "longhaul plan: --config-dir: needs a folder\n"),
    ],
)
def test_wrong_words_are_told_in_one_line(words: list[str], text: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 93
    captured = capsys.readouterr()
    assert captured.err == text and not captured.out


def test_interrupt_is_no_traceback(capsys: pytest.CaptureFixture) -> None:
    assert main(["interrupted"]) == 130
    assert capsys.readouterr().err == "longhaul interrupted: interrupted\n"


@pytest.mark.parametrize("words", ["--help", "pretrain --help"])
def test_closed_pipe_is_no_error(words: str) -> None:
    """As under `| head`: the reader leaves before, or in the middle of, what is printed."""
    process = subprocess.Popen([*COMMAND, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.wait(timeout=scaled(60)), process.stderr.read()) == (141, b"")


def test_folder_with_packages_of_the_same_names_is_not_imported(tmp_path: object) -> None:
    for name in ("train", "conf", "tools", "data_pipeline"):
        (tmp_path / name).mkdir()  # type: ignore[operator]
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")  # type: ignore[operator]
    done = subprocess.run([*COMMAND, "plan", "--help"], cwd=str(tmp_path), capture_output=True, text=True, check=True)
    assert "groups (GROUP=OPTION):" in done.stdout


def test_a_stop_before_anything_was_started(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the corpus is hashed, say: exit code 85, nothing written, the signals' old handlers back."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("train.groundwork.pretraining.verify_sources", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    words = ["model=gpt2_tiny", f"data.sources=[{{path: {corpus}}}]", "data.sequence_length=32", "budget.steps=9"]
    more = ["schedule.warmup_steps=1", "batch.sequences=8", f"run.folder={tmp_path}", "launch.device=cpu"]
    assert main(["pretrain", *words, *more]) == 85
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_while_a_corpus_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that are done stay done, and the same command goes on behind them."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.txt").write_text(f"{number} words of many kinds, " * 40)
    words = ["prepare", "corpus=text", f"corpus.paths=[{text}]", "tokenizer.vocab_size=300", f"output={tmp_path / 'out'}"]
    with monkeypatch.context() as patched:
        patched.setattr("data_pipeline.prepare._publish", lambda *_, **__: signal.raise_signal(signal.SIGUSR1))
        assert main(words) == 85
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert main(words) == 0
    assert (tmp_path / "out" / "manifest.json").exists()
