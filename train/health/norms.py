"""Norms of single tensors, gathered into those of layers and of the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping


def by_layer(norms: Mapping[str, float]) -> dict[str, float]:
    """From `kind/logical name` to `kind` for the whole model and, for weights, `weight.LAYER`."""
    squares: dict[str, float] = {}
    for key, norm in norms.items():
        kind, _, name = key.partition("/")
        parts = name.split(".")
        layer = ".".join(parts[:2] if parts[0] == "blocks" else parts[:1])
        for place in (kind, f"weight.{layer}") if kind == "weight" else (kind,):
            squares[place] = squares.get(place, 0.0) + norm**2
    return {place: math.sqrt(square) for place, square in squares.items()}
