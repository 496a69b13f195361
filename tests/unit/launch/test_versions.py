"""A DeepSpeed that trains otherwise than it is told is refused: before a run has a folder, and where it would be loaded."""

from __future__ import annotations

import logging
import os
from importlib import metadata
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from tests.dist import run_ranks
from tools.cli import main
from train.companions import ranks
from train.engine.engine import load_deepspeed
from train.parallel import ParallelContext
from train.provenance import check_deepspeed


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    real = metadata.version

    def found(name: str) -> str:
        if name != "deepspeed":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)


@pytest.mark.parametrize("version", ["0.19.8", "0.19.8+cu130", "0.19.10", "0.20.0.dev1", "1.0"])
def test_versions_that_are_right(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    installed(monkeypatch, version)
    check_deepspeed()


@pytest.mark.parametrize(
    ("version", "rule"),
    [
        ("0.19.7", "deepspeed=0.19.7: must be at least 0.19.8: .*Muon.* as plain SGD.*parallel.zero=2"),
        ("0.9.12+unknown", "deepspeed=0.9.12"),
        (None, "deepspeed is not installed"),
    ],
)
def test_a_version_that_is_refused(monkeypatch: pytest.MonkeyPatch, version: str | None, rule: str) -> None:
    installed(monkeypatch, version)
    context = ParallelContext(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    for refuses in (check_deepspeed, lambda: load_deepspeed(context)):
        with pytest.raises(UserError, match=rule + r'.* pip install "deepspeed>=0.19.8,<0.20"'):
            refuses()


def test_a_run_is_refused_before_it_has_a_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: Path, tmp_path: Path
) -> None:
    installed(monkeypatch, "0.19.3")
    words = [
        "model=llama_tiny",
        f"data.sources=[{{path: {corpus}}}]",
        "budget.steps=1",
        "data.sequence_length=64",
        "schedule.warmup_steps=0",
        f"run.folder={tmp_path}/runs",
    ]
    assert main(["pretrain", *words]) == 93
    assert "deepspeed=0.19.3: must be at least 0.19.8" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def _is_quiet(_: ParallelContext) -> bool:
    logger = logging.getLogger("torch.utils.cpp_extension")
    before = logger.isEnabledFor(logging.WARNING)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)  # a command of its own, in a process that ends with this test
    with ranks(1, "cpu"):
        return before and not logger.isEnabledFor(logging.WARNING)


def test_no_rank_on_a_cpu_asks_for_the_compiler_of_cuda_aloud() -> None:
    assert run_ranks(_is_quiet, 1) == [True]
