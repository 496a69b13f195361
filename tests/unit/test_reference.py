"""What a run of preferences is compared with, when it is resumed in another precision."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conf.errors import UserError
from train.parallel import single_process
from train.reference import Identity, Reference

BF16 = Identity(rows="rows", base="base", model="model", precision="bf16")
FP32 = Identity(rows="rows", base="base", model="model", precision="fp32")


def given(run_dir: Path, identity: Identity, value: float, elsewhere: str | None = None) -> float:
    """What the loader of three rows has afterwards; `value` is what would be computed."""
    loader: Any = SimpleNamespace(num_rows=3, references_R=None)
    reference = Reference(identity=identity, run_dir=run_dir, elsewhere=elsewhere)
    reference.give({"train": loader}, lambda: {"train": np.full(3, value, dtype=np.float32)}, single_process())
    return float(loader.references_R[0])


def test_a_run_with_checkpoints_keeps_it_in_another_precision(tmp_path: Path) -> None:
    assert given(tmp_path, BF16, 1.0) == 1.0
    assert given(tmp_path, FP32, 2.0) == 2.0, "nothing was trained against the first one"
    (tmp_path / "checkpoints/step-00000010").mkdir(parents=True)
    assert given(tmp_path, BF16, 3.0) == 2.0


def test_that_of_another_run_is_of_the_same_precision(tmp_path: Path) -> None:
    given(tmp_path / "first", BF16, 1.0)
    with pytest.raises(UserError, match="is of other precision; give a run of .* and precision=fp32, or leave it out"):
        given(tmp_path / "second", FP32, 2.0, elsewhere=str(tmp_path / "first"))
