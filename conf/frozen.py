"""Settings that are hashed: of the same settings a later version, which has more fields, computes what the first one did.

A hash that lies on disk (of rows, of a reference) is compared by every later version. So the fields that it was first made of
are listed where it is made, and a field that came later counts only where it is not at its default, which must stay what it
was when the field came.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import MISSING, fields
from typing import Any


def hashed_fields(settings: Any, first: Sequence[str], *, without: Collection[str] = ()) -> dict[str, Any]:
    """Name -> value of a dataclass: fields `first`, in that order, then later ones that are not at their defaults, by name.

    Fields `without` never count.
    """
    others = [field for field in fields(settings) if field.name not in {*first, *without}]
    later = sorted(
        (field for field in others if getattr(settings, field.name) != _default(field)), key=lambda field: field.name
    )
    return {name: getattr(settings, name) for name in (*first, *(field.name for field in later))}


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
