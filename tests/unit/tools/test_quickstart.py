"""The quickstart's decisions, its gates and its environment; the whole way is run by hand."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conf.errors import UserError
from tests.unit.sources import REPOSITORY
from tools.baseline import verdict_of
from tools.quickstart import SIZES_FILE, STEP_TOKENS, STEPS, Speed, main, score_lines, size, sizes_for, speed_of
from tools.requirements import unsatisfied


def test_a_quick_machine_gets_the_most_and_a_slow_one_the_least() -> None:
    quick, slow = (sizes_for(Speed(tokens_per_second=rate, start_seconds=5.0)) for rate in (1e6, 100.0))
    for place, found in ((1, quick), (0, slow)):
        steps = (found.pretrain_steps, found.classification_steps, found.summarisation_steps)
        assert steps == tuple(STEPS[name][place] for name in ("pretrain", "classification", "summarisation"))
    assert (quick.rows, slow.rows) == (400, 200)


def test_sizes_grow_with_the_speed_and_the_forecast_counts_every_token() -> None:
    found = [sizes_for(Speed(tokens_per_second=rate, start_seconds=8.0)) for rate in range(1000, 20000, 500)]
    assert found == sorted(found, key=lambda sizes: (sizes.pretrain_steps, sizes.summarisation_steps, sizes.rows))
    before, after = (sizes_for(Speed(tokens_per_second=100.0, start_seconds=start)) for start in (0.0, 1.0))
    assert before.seconds_left == pytest.approx(sum(STEPS[name][0] * STEP_TOKENS[name] for name in STEPS) / 100, abs=1)
    assert after.seconds_left >= before.seconds_left + 10


def test_the_forecast_of_a_whole_run_that_was_timed() -> None:
    """Two busy cores with AVX2: 985 s from there to the end, with 450, 120 and 100 steps and 200 rows."""
    found = sizes_for(Speed(tokens_per_second=1856.0, start_seconds=47.0))
    steps = {"pretrain": (found.pretrain_steps, 450), "classification": (found.classification_steps, 120)}
    more = sum((decided - timed) * STEP_TOKENS[name] for name, (decided, timed) in steps.items()) / 1856
    assert found.summarisation_steps == 100 and found.rows == 200
    assert found.seconds_left - more == pytest.approx(985, rel=0.05)


def records(rates: list[float]) -> list[dict[str, object]]:
    steps = [{"kind": "train", "step": n + 1, "time": 1010.0 + n, "tokens_per_second": rate} for n, rate in enumerate(rates)]
    return [*steps, {"kind": "evaluation", "step": len(rates)}]


def test_the_speed_leaves_out_the_first_steps_and_an_outlier() -> None:
    speed = speed_of(records([1.0] * 5 + [500.0, 500.0, 500.0, 2.0]), created=1002.5)
    assert speed == Speed(tokens_per_second=500.0, start_seconds=7.5)
    with pytest.raises(UserError, match="5 steps; 6 are needed"):
        speed_of(records([1.0] * 5), created=0.0)


def test_sizes_once_decided_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text('{"created": 1000.0}')
    for rate in (4000.0, 9000.0):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records([rate] * 9)))
        size(tmp_path, 30.0)
    decided = sizes_for(Speed(tokens_per_second=4000.0, start_seconds=10.0))
    told, again = capsys.readouterr().out.split("\nthis machine")[1:]
    what, forecast = told.split("forecast: ")
    assert what == again and f"{decided.pretrain_steps * 1024:,} tokens" in what
    assert forecast.startswith(f"{(decided.seconds_left + 30) / 60:.1f} minutes")
    assert main(["sizes", str(tmp_path)]) == 0
    printed = f"{decided.pretrain_steps} {decided.classification_steps} {decided.summarisation_steps} {decided.rows}\n"
    assert capsys.readouterr().out == printed
    assert json.loads((tmp_path / SIZES_FILE).read_text())["tokens_per_second"] == 4000.0


@pytest.mark.parametrize(
    ("difference", "margin", "code"), [(0.2, 0.1, 0), (0.1, 0.1, 0), (0.05, 0.1, 1), (-1, 0.1, 1), (0, 0, 1), (math.nan, 0, 1)]
)
def test_a_model_that_is_not_far_enough_below_the_bigram_fails(difference: float, margin: float, code: int) -> None:
    assert verdict_of(difference, margin) == code


@pytest.mark.parametrize(("proved", "code"), [(True, 0), (False, 1)])
def test_an_export_that_is_not_proved_fails(
    proved: bool, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = {"proved": proved, "proof": {"held_out_loss": {"longhaul": 3.25, "transformers": 3.25}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main(["proof", str(tmp_path / "report.json")]) == code
    said = capsys.readouterr()
    assert ("3.250000 in transformers" in said.out) == proved and ("is not proved" in said.err) == (not proved)


def score(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


@pytest.mark.parametrize(("after", "where"), [(0.7, "BELOW the best"), (0.8, "above the best")])
def test_the_scores_say_in_words_where_the_model_is(after: float, where: str) -> None:
    of = {"majority": 0.1, "tfidf": 0.75, "before fine-tuning": 0.9, "after fine-tuning": after}
    means = {title: {"accuracy": score(value), "f1_macro": score(0.5)} for title, value in of.items()}
    *table, verdict = score_lines({"classification": means})
    assert f"is {where} of the simple means, accuracy {after:.3f} against 0.750 of 'tfidf'" in verdict
    assert any("0.750 [0.700, 0.800]" in line for line in table)


# --- the script, with commands that do nothing

STUB = """
make_environment() { :; }
longhaul() {
    echo "$1" >> calls
    [ "$1" = "$FAILS" ] && return 1
    case "$*" in *stop_at_step*) return 85 ;; esac
}
python() {
    case "$*" in
        *"quickstart sizes"*) echo 300 120 100 200 ;;
        *"quickstart proof"*) [ "$FAILS" != proof ] ;;
        *) echo 1 ;;
    esac
}
"""


@pytest.mark.parametrize(
    ("fails", "last"), [("baseline", "baseline"), ("proof", "export"), ("task-baseline", "task-baseline"), ("", "evaluate")]
)
def test_a_stage_that_fails_ends_the_script(fails: str, last: str, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    shutil.copy(REPOSITORY / "tools/quickstart.sh", tmp_path / "tools")
    (tmp_path / "tools/environment.sh").write_text(STUB)
    command = ["bash", "tools/quickstart.sh"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "FAILS": fails}, capture_output=True, text=True)
    assert (done.returncode == 0) == (not fails), done.stderr
    assert (tmp_path / "calls").read_text().split()[-1] == last
    assert (" s for the environment, " in done.stdout) == (not fails)


@pytest.mark.parametrize("name", ["quickstart", "environment", "test", "campaign"])
def test_shellcheck_finds_nothing(name: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", f"tools/{name}.sh"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- the environment


def test_a_requirement_is_met_by_its_version_and_its_marker() -> None:
    installed = {"numpy": "2.1.0", "torch": "2.13.0+cpu"}

    def version_of(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    wanted = ["numpy>=1.26,<2", "torch>=2.11", "wandb>=0.22", "tomli; python_version < '3'"]
    assert unsatisfied(wanted, version_of) == ["numpy<2,>=1.26: 2.1.0 is installed", "wandb>=0.22: not installed"]


def made(venv: Path) -> subprocess.CompletedProcess[str]:
    command = '. tools/environment.sh; make_environment && echo "$(type -t longhaul) $PYTHONPATH $(command -v python)"'
    environment = {**os.environ, "VENV": str(venv)}
    return subprocess.run(["bash", "-c", command], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_an_environment_that_satisfies_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = made(tmp_path)
    assert done.stdout.split() == ["function", str(REPOSITORY), str(python)], done.stderr


def test_an_environment_that_lacks_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    assert "holds no bin/python" in made(tmp_path).stderr
    python = tmp_path / "bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # sees no package
    python.chmod(0o755)
    done = made(tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert "does not satisfy what this project needs" in done.stderr and "leave VENV out" in done.stderr
