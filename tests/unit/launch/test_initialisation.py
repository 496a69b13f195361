"""Which version of the initial values a run began with is kept with it, whatever version resumes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conf.compose import read_config
from tests.golden import recorded
from train.config.runs import RUNS
from train.launch import prepare_folder
from train.model.philox import INITIALISATION
from train.state import TrainState


def recorded_version(run_dir: Path) -> int | None:
    name = recorded.NAMES[0]
    prepare_folder(run_dir, read_config(RUNS, recorded.FOLDER / "runs" / name / "config.yaml"))
    return json.loads((run_dir / "run.json").read_text(encoding="utf-8")).get("initialisation")


def test_a_run_keeps_the_version_that_it_began_with(tmp_path: Path) -> None:
    assert recorded_version(tmp_path / "new") == recorded_version(tmp_path / "new") == INITIALISATION == 2
    old = shutil.copytree(recorded.FOLDER / "runs" / recorded.NAMES[0], tmp_path / "old")
    assert recorded_version(old) is None, "its weights are those that an older program drew"
    shutil.rmtree(old / "checkpoints")
    assert recorded_version(old) == INITIALISATION, "it has no weights yet, and begins with those of today"


@pytest.mark.parametrize("version", [1, 2])
def test_a_checkpoint_keeps_it_too(version: int) -> None:
    state = TrainState(initialisation=version)
    assert TrainState.from_plain(json.loads(json.dumps(state.to_plain()))).initialisation == version
    assert TrainState.from_plain({"step": 3}).initialisation == 1
