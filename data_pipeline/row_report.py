"""What became of the rows: how many were read, cut, left out and why, and how full the sequences are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.records import BadRow


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Rows that were left out for one reason."""

    reason: str
    """Why."""
    count: int
    """How many."""
    first: str
    """The first of them: its place, and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """One split."""

    rows: int = 0
    """Rows that are used; of preferences the pairs."""
    cut: int = 0
    """Of them, those that were longer than a sequence."""
    tokens: int = 0
    """Tokens that the model reads in an epoch, without padding."""
    targets: int = 0
    """Of them, those with something to learn."""
    sequences: int = 0
    """Sequences of an epoch."""
    places: int = 0
    """Tokens of these sequences, padding included."""

    @property
    def efficiency(self) -> float:
        """Share of the places that hold a token, from 0 to 1."""
        return self.tokens / max(1, self.places)


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """All rows of a fine-tuning."""

    found: tuple[str, ...]
    """What the columns of the files are taken for."""
    read: int
    """Rows of the files."""
    dropped: tuple[Dropped, ...]
    """Those that are left out, the most frequent reason first."""
    train: SplitReport
    """Rows to learn from."""
    validation: SplitReport
    """Held-out rows."""
    shared: int
    """Held-out rows that are among those to learn from as well."""

    def lines(self) -> list[str]:
        """The report for a person."""
        told = [*self.found, f"{self.read:,} rows read: {self.train.rows:,} to train on, {self.validation.rows:,} held out"]
        for name, part in (("train", self.train), ("held out", self.validation)):
            if not part.rows:
                continue
            cut = f", {part.cut:,} rows cut" if part.cut else ""
            told.append(
                f"{name}: {part.sequences:,} sequences, {part.efficiency:.1%} full; {part.tokens:,} tokens, of them "
                f"{part.targets:,} targets ({part.targets / part.tokens:.1%}){cut}"
            )
        told += [f"left out: {drop.count:,} ({drop.reason}), the first: {drop.first}" for drop in self.dropped]
        if self.shared:
            told.append(f"{self.shared:,} of the held-out rows are among the training rows as well, so they measure memory too")
        return told


def report_from_json(content: Mapping[str, Any]) -> RowReport:
    """The inverse of dataclasses.asdict."""
    return RowReport(
        **{
            **content,
            "found": tuple(content["found"]),
            "dropped": tuple(Dropped(**drop) for drop in content["dropped"]),
            "train": SplitReport(**content["train"]),
            "validation": SplitReport(**content["validation"]),
        }
    )


class Tally:
    """Counts bad rows by their fault."""

    def __init__(self) -> None:
        self._drops: dict[str, Dropped] = {}
        self._order: list[BadRow] = []

    def add(self, bad: BadRow) -> None:
        """One more."""
        found = self._drops.get(bad.fault)
        if found is None:
            self._order.append(bad)
            found = Dropped(reason=str(bad.fault), count=0, first=str(bad))
        self._drops[bad.fault] = dataclasses.replace(found, count=found.count + 1)

    def dropped(self, but: Iterable[str] = ()) -> tuple[Dropped, ...]:
        """The most frequent first, without some faults."""
        kept = [drop for drop in self._drops.values() if drop.reason not in set(but)]
        return tuple(sorted(kept, key=lambda drop: -drop.count))

    def first(self, but: Iterable[str] = ()) -> Dropped | None:
        """That of the first bad row, without some faults."""
        return next((self._drops[bad.fault] for bad in self._order if bad.fault not in set(but)), None)
