"""What `compare_revision.sh` says of a run: equal, different as it was declared, or different; and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.errors import UserError
from tests.golden import recorded
from tests.timeouts import scaled
from tests.unit.sources import REPOSITORY
from tools.compare_revision import DeclaredChange, declared_since, figures, judge, relative
from train.checkpoint.manifest import published
from train.checkpoint.stored import StoredCheckpoint
from train.metrics.jsonl import FILE_NAME

RUN = "lora-zero1-tensor2"
LOSS = DeclaredChange(runs="lora-*", figures="train.loss", bound=1e-3, reason="sums in another order")
REFERENCE = recorded.FOLDER / "runs" / RUN


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REFERENCE, tmp_path / RUN, symlinks=True))


def change_records(run_dir: Path, change: Callable[[dict], object]) -> None:
    """Change each record of a step."""
    lines = [json.loads(line) for line in (run_dir / FILE_NAME).read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["kind"] == "train":
            change(line)
    (run_dir / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_equal_to_the_bit(other: Path) -> None:
    change_records(other, lambda line: line.update(seconds_lost=line["seconds_lost"] + 1))
    verdict = judge(RUN, REFERENCE, other, [])
    assert verdict.fits and verdict.lines == [f"{RUN:<30} equal to the bit"]


def test_a_difference_counts_unless_it_was_declared(other: Path) -> None:
    change_records(other, lambda line: line.update(loss=line["loss"] * (1 + 5e-4)))
    verdict = judge(RUN, REFERENCE, other, [])
    assert not verdict.fits and "DIFFERS: train.loss by 5.0e-04" in verdict.lines[0]
    assert "loss is" in verdict.lines[1]
    verdict = judge(RUN, REFERENCE, other, [LOSS])
    assert verdict.fits and verdict.lines == [
        f"{RUN:<30} train.loss within the declared bound 1.0e-03: sums in another order (found: 5.0e-04)"
    ]


@pytest.mark.parametrize("field", ["runs", "figures", "bound"])
def test_what_was_declared_of_something_else_is_no_reason(other: Path, field: str) -> None:
    change_records(other, lambda line: line.update(loss=line["loss"] * (1 + 5e-4)))
    value = {"runs": "pretrain-*", "figures": "train.lr", "bound": 1e-4}[field]
    assert not judge(RUN, REFERENCE, other, [DeclaredChange(**{**vars(LOSS), field: value})]).fits


def test_a_new_key_needs_a_bound_of_null(other: Path) -> None:
    change_records(other, lambda line: line.update(mood=1.0))
    new = {"runs": "*", "figures": "train.mood", "reason": "a new key"}
    assert not judge(RUN, REFERENCE, other, [DeclaredChange(bound=1.0, **new)]).fits
    assert judge(RUN, REFERENCE, other, [DeclaredChange(bound=None, **new)]).fits


def test_a_changed_moment_of_an_adapter_is_noticed(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = StoredCheckpoint.read

    def changed(self: StoredCheckpoint, name: str, kind: str = "weight") -> object:
        value = read(self, name, kind)
        return value * 1.5 if self.path.is_relative_to(other) and kind == "exp_avg_sq" else value

    monkeypatch.setattr(StoredCheckpoint, "read", changed)
    assert figures(REFERENCE, other) == {"checkpoint.exp_avg_sq": pytest.approx(0.5)}
    assert judge(RUN, REFERENCE, other, []).lines[0].endswith("DIFFERS: checkpoint.exp_avg_sq by 5.0e-01")


def test_no_declared_bound_allows_what_is_no_number(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = StoredCheckpoint.read

    def changed(self: StoredCheckpoint, name: str, kind: str = "weight") -> object:
        value = read(self, name, kind)
        return value * float("nan") if self.path.is_relative_to(other) and kind == "exp_avg" else value

    monkeypatch.setattr(StoredCheckpoint, "read", changed)
    declared = DeclaredChange(runs="*", figures="checkpoint.*", bound=0.5, reason="sums in another order")
    assert figures(REFERENCE, other) == {"checkpoint.exp_avg": float("inf")}
    assert not judge(RUN, REFERENCE, other, [declared]).fits


def test_a_run_without_a_checkpoint_differs(other: Path) -> None:
    shutil.rmtree(published(other / "checkpoints")[-1])
    verdict = judge(RUN, REFERENCE, other, [])
    assert not verdict.fits and "holds no checkpoint" in verdict.lines[0]


def test_relative() -> None:
    assert relative(2.0, 2.0) == relative("a", "a") == 0 and relative(2.0, -2.0) == 2
    assert relative([1.0, 2.0, "a"], [1.0, 4.0, "a"]) == 0.5 and relative([1.0], [1.0, 2.0]) == float("inf")
    assert relative(1, None) == relative("a", "b") == float("inf") and relative(0.0, 4.0) == 1


def test_what_the_older_revision_had_declared_is_no_reason(tmp_path: Path) -> None:
    """It is part of what that revision does."""
    entry = "- {{runs: '*', figures: train.loss, bound: {}, reason: another order}}\n"
    now, before = tmp_path / "now.yaml", tmp_path / "before.yaml"
    now.write_text("changes:\n" + entry.format(0.5) + entry.format(0.25))
    assert [change.bound for change in declared_since(now, before)] == [0.5, 0.25], "it had no list"
    before.write_text("changes:\n" + entry.format(0.5))
    assert [change.bound for change in declared_since(now, before)] == [0.25]
    now.write_text("changes:\n" + entry.format(0))
    with pytest.raises(UserError, match="bound=0.0: must be above 0; null allows any difference"):
        declared_since(now, before)


def test_the_list_of_this_revision_can_be_read() -> None:
    declared_since(recorded.FOLDER / "declared_changes.yaml", Path("none"))


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="an exported tree has no revisions")
@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "give a revision"),
        (("no-such-thing",), "no-such-thing: no such revision here; fetch it, or give one that `git log` shows"),
        (("HEAD", "no-such-run"), "no-such-run: no such run; there are: "),
    ],
)
def test_refused(words: tuple[str, ...], text: str) -> None:
    script = REPOSITORY / "tools" / "compare_revision.sh"
    done = subprocess.run(
        ["bash", str(script), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=scaled(60),
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 2 and text in done.stderr
