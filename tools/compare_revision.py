"""How far a run that two revisions have gone on with differs, and whether that was declared. The part of `compare_revision.sh`
that reads runs: `python -m tools.compare_revision RUN REFERENCE OTHER DECLARED DECLARED_BEFORE`.

A difference is measured by figures: `train.loss`, `evaluation.perplexity`, `state.samples`, `checkpoint.exp_avg`. A change of
numerics is declared in a file, with the figures that it moves and how far; what the older revision had declared already is
part of it, and excuses nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from conf.compose import read_config
from conf.errors import ConfigError, UserError
from tools.exactness import comparable_state, differences, newest_checkpoint, records, summary, tensor_names
from train.config.changes import leaves

SHOWN = 3
MOST_CHARACTERS = 160  # state.json is one line


@dataclass(frozen=True, kw_only=True)
class DeclaredChange:
    """One change of numerics that was made on purpose."""

    runs: str
    """Pattern of the names of the recorded runs that it concerns, such as *-tensor2."""
    figures: str
    """Pattern of the figures that it moves, such as train.* or checkpoint.*."""
    bound: float | None
    """Largest relative difference; null: any, such as that of a new key."""
    reason: str
    """What changed, and why."""

    def __post_init__(self) -> None:
        problems = []
        if self.bound is not None and self.bound <= 0:
            problems.append(f"bound={self.bound}: must be above 0; null allows any difference")
        if not self.reason:
            problems.append("reason='': say what changed, and why")
        if problems:
            raise ConfigError(problems)

    def allows(self, run: str, figure: str, difference: float) -> bool:
        """Whether it is the reason of a difference."""
        fits = fnmatchcase(run, self.runs) and fnmatchcase(figure, self.figures)
        return fits and (self.bound is None or difference <= self.bound)


@dataclass(frozen=True, kw_only=True)
class DeclaredChanges:
    """The file of declared changes."""

    changes: tuple[DeclaredChange, ...] = ()
    """The oldest first."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came out for one run."""

    fits: bool
    """Whether the runs are equal, or differ as it was declared."""
    lines: Sequence[str]
    """For a person."""


def declared_since(now: Path, before: Path) -> tuple[DeclaredChange, ...]:
    """The changes of one file that the other does not have; `before` may be missing.

    Raises UserError for a file that cannot be read.
    """
    known = read_config(DeclaredChanges, before).changes if before.is_file() else ()
    return tuple(change for change in read_config(DeclaredChanges, now).changes if change not in known)


def judge(run: str, reference: Path, other: Path, declared: Sequence[DeclaredChange]) -> Verdict:
    """Compare one run as two revisions have left it."""
    found = differences(reference, other)
    if not found:
        return Verdict(fits=True, lines=[f"{run:<30} equal to the bit"])
    try:
        measured = figures(reference, other)
    except UserError as error:
        return Verdict(fits=False, lines=[f"{run:<30} DIFFERS: {error}"])
    reasons: dict[str, float] = {}
    unexplained = {}
    for figure, difference in measured.items():
        change = next((change for change in declared if change.allows(run, figure, difference)), None)
        if change is None:
            unexplained[figure] = difference
        else:
            line = f"{change.figures} within the declared bound {shown(change.bound)}: {change.reason}"
            reasons[line] = max(reasons.get(line, 0.0), difference)
    if unexplained or not measured:
        worst = sorted(unexplained.items(), key=lambda item: -item[1])
        text = ", ".join(f"{figure} by {shown(difference)}" for figure, difference in worst)
        details = [f"    {line[:MOST_CHARACTERS]}" for line in summary(found, most=SHOWN)]
        return Verdict(fits=False, lines=[f"{run:<30} DIFFERS: {text or 'in what has no figure'}", *details])
    lines = [f"{line} (found: {shown(difference)})" for line, difference in reasons.items()]
    return Verdict(fits=True, lines=[f"{run:<30} {'; '.join(lines)}"])


def figures(reference: Path, other: Path) -> dict[str, float]:
    """Figure -> largest relative difference between two runs; those without any are left out. Infinite: no number says how far.

    Raises CheckpointError when one of them has no checkpoint, or lacks tensors that the other has.
    """
    found: dict[str, float] = {}

    def note(figure: str, difference: float) -> None:
        distance = difference if math.isfinite(difference) else math.inf  # the maximum of a number and NaN is the number
        if distance:
            found[figure] = max(found.get(figure, 0.0), distance)

    left, right = records(reference), records(other)
    for key in left.keys() | right.keys():
        for name, difference in _of_values(left.get(key, {}), right.get(key, {})).items():
            note(f"{key[0]}.{name}", difference)
    _of_checkpoints(newest_checkpoint(reference), newest_checkpoint(other), note)
    return found


def _of_values(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, float]:
    return {name: relative(left.get(name), right.get(name)) for name in left.keys() | right.keys()}


def _of_checkpoints(reference: Path, other: Path, note: Any) -> None:
    from train.checkpoint.reader import CheckpointReader

    left, right = CheckpointReader(reference), CheckpointReader(other)
    states = [leaves(comparable_state(reader.state)) for reader in (left, right)]
    for name, difference in _of_values(*states).items():
        note(f"state.{name}", difference)
    for name in tensor_names(left):
        for kind in left.kinds(name):
            mine, theirs = left.read(name, kind).double(), right.read(name, kind).double()
            size, distance = mine.norm().item(), (mine - theirs).norm().item()
            note(f"checkpoint.{kind}", distance / size if size else distance and math.inf)


def relative(one: Any, other: Any) -> float:
    """Relative difference of two numbers, the largest of two lists of them; of anything else 0 where it is equal, and otherwise
    infinite."""
    if one == other:
        return 0.0
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max(map(relative, one, other))
    if not isinstance(one, (int, float)) or not isinstance(other, (int, float)):
        return math.inf
    difference = abs(one - other) / max(abs(one), abs(other))
    return difference if math.isfinite(difference) else math.inf


def shown(difference: float | None) -> str:
    """A difference or a bound, human-readable."""
    return "any" if difference is None else f"{difference:.1e}"


def main(arguments: Sequence[str]) -> int:
    """Print what came out for one run; 1 when it differs otherwise than it was declared."""
    run, *places = arguments
    reference, other, now, before = map(Path, places)
    try:
        verdict = judge(run, reference, other, declared_since(now, before))
    except UserError as error:
        print(f"compare_revision: {error}", file=sys.stderr)
        return 2
    print(*verdict.lines, sep="\n", flush=True)
    return 0 if verdict.fits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
