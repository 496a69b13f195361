"""Whether two runs are one and the same to the bit: metrics, the loop's state, weights and moments.

What a clock or a machine decides is left out; everything else has to be equal, not close.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from train.checkpoint.manifest import CheckpointError, published
from train.metrics.goodput import Goodput
from train.metrics.jsonl import FILE_NAME, read_metrics
from train.metrics.record import Value

if TYPE_CHECKING:
    from train.checkpoint.reader import CheckpointReader

TIME_LIKE = frozenset(
    {"time", "attempt", "seconds", "step_seconds", "data_wait_seconds", "tokens_per_second", "mfu", "mfu_causal", "memory_gib"}
    | {
        "checkpoint_stall_seconds",
        "probe_seconds",
        "busy_seconds_median",
        "busy_seconds_max",
        "straggler_ratio",
        "slowest_rank",
        "slowest_host",
        *Goodput().fields(),
    }
)
"""Fields of a record that differ between two runs of the same program on the same machine."""


def differences(reference: Path, other: Path) -> list[str]:
    """What differs between two runs' folders, one line each; empty when they are the same run.

    A file that is missing or damaged is a difference too.
    """
    found = []
    for compare in (metrics_differences, checkpoint_differences):
        try:
            found += compare(reference, other)
        except UserError as error:
            found.append(str(error))
    return found


def summary(found: Sequence[str], *, most: int) -> list[str]:
    """The first `most` of what `differences` found among the records, the first `most` of the rest, and how many more."""
    of_records = [line for line in found if line.startswith(f"{FILE_NAME}: ")]
    others = [line for line in found if not line.startswith(f"{FILE_NAME}: ")]
    lines = of_records[:most] + others[:most]
    left = len(found) - len(lines)
    return [*lines, f"and {left:,} more differences"] if left else lines


def metrics_differences(reference: Path, other: Path) -> list[str]:
    """Steps and evaluations that differ in value, or that only one of the runs has."""
    left, right = records(reference), records(other)
    found = []
    for key in sorted(left.keys() | right.keys(), key=lambda key: (key[1], key[0])):
        place = f"{FILE_NAME}: {key[0]} of step {key[1]}"
        if key not in right or key not in left:
            found.append(f"{place} is missing in {other if key in left else reference}")
            continue
        for name in sorted(left[key].keys() | right[key].keys()):
            values = left[key].get(name), right[key].get(name)
            if values[0] != values[1]:
                found.append(f"{place}: {name} is {values[1]}, undisturbed {values[0]}")
    return found


def checkpoint_differences(reference: Path, other: Path) -> list[str]:
    """What differs between the newest checkpoints: their step, the loop's state, any bit of weights and moments.

    Raises CheckpointError when one of them is missing or damaged.
    """
    import torch

    from train.checkpoint.reader import CheckpointReader

    left, right = (CheckpointReader(newest_checkpoint(folder)) for folder in (reference, other))
    left.verify()
    right.verify()
    if left.step != right.step:
        return [f"newest checkpoint: of step {right.step}, undisturbed {left.step}"]
    found = []
    mine, theirs = comparable_state(left.state), comparable_state(right.state)
    if mine != theirs:
        found.append(f"state.json: {json.dumps(theirs)}, undisturbed {json.dumps(mine)}")
    names = tensor_names(left)
    if names != tensor_names(right):
        return [*found, "newest checkpoint: holds other tensors"]
    for name in names:
        for kind in left.kinds(name):
            mine, theirs = left.read(name, kind), right.read(name, kind)
            # As integers: a NaN is equal to itself, and 0.0 is not -0.0.
            unequal = int((mine.view(torch.int32) != theirs.view(torch.int32)).sum())
            if unequal:
                found.append(f"{kind} of {name}: {unequal:,} of {mine.numel():,} elements differ")
    return found


def tensor_names(reader: CheckpointReader) -> tuple[str, ...]:
    """Logical names of all tensors that a checkpoint holds, with those of adapters, whose moments no other tensor shows."""
    return (*reader.names, *reader.adapter_names)


def comparable_state(state: dict[str, Any]) -> dict[str, Any]:
    """Without the step of the checkpoint that a rollback went back to: a run that was stopped has others."""
    entries = [{key: entry[key] for key in entry if key != "to_step"} for entry in state.get("interventions", [])]
    return {**state, "interventions": entries}


def num_records(run_dir: Path) -> int:
    """Steps and evaluations that count."""
    return len(records(run_dir))


def records(run_dir: Path) -> dict[tuple[str, int, str], Mapping[str, Value]]:
    """(kind, step, name) -> the record that counts, without what a clock decides."""
    return {
        (str(record["kind"]), int(record["step"]), str(record.get("name", ""))): {
            key: _spelled(value) for key, value in record.items() if key not in TIME_LIKE
        }
        for record in read_metrics(run_dir / FILE_NAME)
    }


def _spelled(value: Value) -> Value:
    """The value, or the text of a number that is not equal to itself."""
    return value if value == value else "nan"


def newest_checkpoint(run_dir: Path) -> Path:
    """Folder of the newest checkpoint. Raises CheckpointError when there is none."""
    folders = published(run_dir / "checkpoints")
    if not folders:
        raise CheckpointError(f"{run_dir}: holds no checkpoint")
    return folders[-1]
