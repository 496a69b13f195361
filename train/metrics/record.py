"""A record of one step, and the protocol of what takes it. Every writer gets the same complete record."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Value = float | int | str
Record = Mapping[str, Value]
Level = Literal["info", "warn", "error"]

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_TEXT_KEYS = frozenset({"kind", "name"})
"""Keys whose value stays a text, whatever it spells."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Who is reporting: the same in every attempt but for `attempt`."""

    name: str
    """Name of the run, as people call it."""
    run_id: str
    """Our own id of the run."""
    wandb_id: str
    """Id of the run in Weights & Biases, made once and kept in run.json."""
    attempt: int
    """Number of the attempt, from 1."""
    job_type: str
    """The verb: pretrain, finetune, evaluate."""
    group: str
    """Runs that belong together."""
    resolved_config: dict[str, Any]
    """The configuration as config.yaml has it."""
    layout: dict[str, Any]
    """How the state lies on the ranks."""
    notes: str = ""
    """Free text about the run."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a model answered to one held-out row."""

    id: str
    """File and line of the row."""
    input: str
    truth: str
    output: str
    scores: dict[str, float]
    """Figures of this row alone."""


class Writer(Protocol):
    """Takes the records of a run. `write` and `alert` never raise for a reason that lies outside the program."""

    def write(self, record: Record) -> None:
        """Take one complete record: kind, attempt, step, time and values."""

    def outputs(self, step: int, outputs: Sequence[Output]) -> None:
        """Take what the model answered after a step."""

    def alert(self, title: str, text: str, level: Level) -> None:
        """Tell people something now."""

    def close(self, outcome: str) -> None:
        """Write out what is held; `outcome` is finished, stopped or anything worse."""


def plain(record: Mapping[str, Any]) -> dict[str, Value]:
    """The record with plain Python values.

    Raises TypeError for anything else: a tensor here would make each writer wait for the device in its own place.
    """
    values: dict[str, Value] = {}
    for key, value in record.items():
        if isinstance(value, bool | int):
            values[key] = int(value)
        elif isinstance(value, float | str):
            values[key] = float(value) if isinstance(value, float) else value
        else:
            raise TypeError(f"metric {key} is a {type(value).__name__}; give a number, for a tensor its item()")
    return values


def encode(record: Record) -> bytes:
    """One line of strict JSON. Floats keep every bit (repr); NaN and infinities become texts."""
    values = {
        key: repr(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return (json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n").encode()


def decode(line: bytes) -> dict[str, Value]:
    """The record of a line.

    Raises ValueError for a line that is not one record.
    """
    values = json.loads(line)
    if not isinstance(values, dict) or "kind" not in values or not isinstance(values.get("step"), int):
        raise ValueError("not a record: needs kind and step")
    return {
        key: _NON_FINITE[value] if key not in _TEXT_KEYS and value in ("nan", "inf", "-inf") else value
        for key, value in values.items()
    }
