"""metrics.jsonl: exact, strict, repaired, and the truth after a rollback."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from pathlib import Path

import pytest

from conf.errors import UserError
from train.metrics.jsonl import JsonlWriter, read_metrics
from train.metrics.record import decode, encode, plain


def train_record(step: int, attempt: int = 1, **values: float | str) -> dict[str, float | int | str]:
    return {"kind": "train", "attempt": attempt, "step": step, "time": 1.0, **values}


def write(path: Path, *records: dict[str, float | int | str]) -> None:
    writer = JsonlWriter(path, say=pytest.fail)
    for record in records:
        writer.write(record)
    writer.close("finished")


def test_floats_keep_every_bit(tmp_path: Path) -> None:
    losses = [0.1 + 0.2, 1e-308, 5e-324, struct.unpack("d", b"\x01\x02\x03\x04\x05\x06\xf7\x3f")[0], -0.0]
    write(tmp_path / "m", *(train_record(step, loss=loss) for step, loss in enumerate(losses)))
    read = [record["loss"] for record in read_metrics(tmp_path / "m")]
    assert [struct.pack("d", loss) for loss in read] == [struct.pack("d", loss) for loss in losses]


def test_non_finite_values_are_strict_json(tmp_path: Path) -> None:
    write(tmp_path / "m", train_record(1, loss=math.nan, grad_norm=math.inf, lr=-math.inf))
    line = json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["grad_norm"], line["lr"]) == ("nan", "inf", "-inf")
    record = read_metrics(tmp_path / "m")[0]
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf and record["lr"] == -math.inf


def test_a_held_out_set_may_be_named_inf() -> None:
    assert decode(encode({"kind": "evaluation", "step": 1, "name": "inf"}))["name"] == "inf"


def test_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    evaluation = {"kind": "evaluation", "attempt": 1, "step": 2, "time": 1.0, "loss": 9.0}
    write(tmp_path / "m", *(train_record(step, loss=float(step)) for step in (1, 2, 3, 4)), evaluation)
    write(tmp_path / "m", *(train_record(step, attempt=2, loss=step + 0.5) for step in (3,)))
    write(tmp_path / "m", {**evaluation, "name": "code"}, {**evaluation, "loss": 8.0})
    assert [(r["kind"], r["step"], r["loss"], r["attempt"]) for r in read_metrics(tmp_path / "m")] == [
        ("train", 1, 1.0, 1),
        ("train", 2, 2.0, 1),
        ("evaluation", 2, 8.0, 1),
        ("evaluation", 2, 9.0, 1),
        ("train", 3, 3.5, 2),
        ("train", 4, 4.0, 1),
    ]


@pytest.mark.parametrize(
    ("torn", "steps"),
    [
        (b'{"kind": "train", "step": 2, "lo', [1, 3]),
        (b"\x00" * 40, [1, 3]),
        (b'{"kind": "train", "attempt": 1, "step": 2}', [1, 2, 3]),
        (b"x" * 200_000, [1, 3]),
    ],
)
def test_a_torn_line_is_cut_or_completed(tmp_path: Path, torn: bytes, steps: list[int]) -> None:
    path = tmp_path / "m"
    write(path, train_record(1))
    with path.open("ab") as file:
        file.write(torn)
    assert [record["step"] for record in read_metrics(path)] == steps[:-1], "the reader tolerates it"
    write(path, train_record(3))
    assert [record["step"] for record in read_metrics(path)] == steps


def test_a_file_that_is_one_torn_line_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b'{"kind"')
    write(tmp_path / "m", train_record(1))
    assert len(read_metrics(tmp_path / "m")) == 1


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"step": 1}', '{"kind": "train", "step": "1"}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    write(tmp_path / "m", train_record(1))
    with (tmp_path / "m").open("a") as file:
        file.write(line + "\n")
    write(tmp_path / "m", train_record(2))
    with pytest.raises(UserError, match=r"m:2: not a metrics line"):
        read_metrics(tmp_path / "m")


def test_a_missing_file_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder of a run"):
        read_metrics(tmp_path / "m")
    with pytest.raises(UserError, match="cannot be opened for writing"):
        JsonlWriter(tmp_path / "no" / "m", say=pytest.fail)


def test_a_full_disk_holds_lines_back_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    writer = JsonlWriter(tmp_path / "m", say=said.append)
    writer.write(train_record(1))
    true_write = os.write

    def full(file: int, data: bytes) -> int:
        return true_write(file, data[:10])  # what a disk does that fills up within a line

    monkeypatch.setattr(os, "write", full)
    writer.write(train_record(2))
    writer.write(train_record(3))
    assert (tmp_path / "m").read_bytes().count(b"\n") == 1 and (tmp_path / "m").read_bytes().endswith(b"\n")
    assert len(said) == 1 and os.strerror(errno.ENOSPC) in said[0]
    monkeypatch.setattr(os, "write", true_write)
    writer.write(train_record(4))
    assert "written again" in said[1]
    assert [record["step"] for record in read_metrics(tmp_path / "m")] == [1, 2, 3, 4]
    monkeypatch.setattr(os, "write", full)
    writer.write(train_record(5))
    writer.close("finished")
    assert "last 1 lines could not be written" in said[-1]


def test_values_become_plain() -> None:
    import numpy
    import torch

    values = plain({"skipped": True, "loss": numpy.float64(0.5), "name": "code", "step": 3})
    assert values == {"skipped": 1, "loss": 0.5, "name": "code", "step": 3}
    assert type(values["skipped"]) is int and type(values["loss"]) is float
    with pytest.raises(TypeError, match="metric grad_norm is a Tensor"):
        plain({"grad_norm": torch.tensor(1.0)})
