"""Where the wall-clock time of a run goes, over all its attempts."""

from __future__ import annotations

from collections.abc import Mapping

CATEGORIES = ("productive", "lost", "restart", "checkpoint", "evaluation", "idle")


class Goodput:
    """Seconds by category."""

    def __init__(self, carried: Mapping[str, float] | None = None) -> None:
        self._seconds = {name: float((carried or {}).get(f"seconds_{name}", 0.0)) for name in CATEGORIES}

    def add(self, category: str, seconds: float) -> None:
        """Book `seconds`."""
        self._seconds[category] += seconds

    def lose(self, seconds: float) -> None:
        """What was work has to be done again."""
        seconds = min(seconds, self._seconds["productive"])
        self._seconds["productive"] -= seconds
        self._seconds["lost"] += seconds

    def fields(self) -> dict[str, float]:
        """As the fields of a record."""
        total = sum(self._seconds.values())
        fields = {f"seconds_{name}": seconds for name, seconds in self._seconds.items()}
        return {**fields, "goodput": self._seconds["productive"] / total if total else 0.0}
