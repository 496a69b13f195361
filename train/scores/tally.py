"""The one form that every metric takes: what each example adds, and figures of the weighted sum. So the reduction over ranks,
the bootstrap and the paired comparison are one mechanism, and no figure is ever a mean of means. Knows no metric.

Shapes: N examples, K statistics of an example, R weightings, J statistics of an example that are not zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from conf.errors import UserError


class Tally(Protocol):
    """The examples of one evaluation as one metric sees them."""

    @property
    def num_examples(self) -> int:
        """N."""

    def figures(self, weights_RN: np.ndarray) -> dict[str, np.ndarray]:
        """Figure -> its value under each weighting [R], nan where it is undefined. A weight is how often the example counts."""

    def undefined(self, name: str) -> str:
        """Why the figure is nan where every example counts once, as the end of a sentence."""

    def selected(self, places_M: np.ndarray) -> Tally:
        """The tally of the examples at these places alone, in this order."""


class Function(Protocol):
    """Figures of a sum of statistics. Compares equal to another that computes the same from the same statistics."""

    def __call__(self, sums_RK: np.ndarray) -> dict[str, np.ndarray]:
        """Figure -> its value for each sum [R], nan where it is undefined."""

    def undefined(self, name: str, sums_K: np.ndarray) -> str:
        """Why the figure is nan for this sum, as the end of a sentence."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseRows:
    """Statistics of examples that are zero almost everywhere: of 100,000 examples and 100 labels, 5 MB and not 240 MB."""

    columns_NJ: np.ndarray
    """Which statistics an example adds to."""
    values_NJ: np.ndarray
    """What it adds there."""
    num_columns: int
    """K."""

    def __len__(self) -> int:
        return len(self.columns_NJ)

    def sums(self, weights_RN: np.ndarray) -> np.ndarray:
        """Weighted sums over the examples [R, K]; four times as quick as a product with the zeros written out."""
        columns = self.columns_NJ.ravel()
        added = [(weights_N[:, None] * self.values_NJ).ravel() for weights_N in weights_RN]
        return np.stack([np.bincount(columns, weights=values, minlength=self.num_columns) for values in added])

    def __getitem__(self, places_M: np.ndarray) -> SparseRows:
        return replace(self, columns_NJ=self.columns_NJ[places_M], values_NJ=self.values_NJ[places_M])


@dataclass(frozen=True, kw_only=True, eq=False)
class Additive:
    """A tally whose figures are a function of the sum of the examples' statistics."""

    rows_NK: np.ndarray | SparseRows
    """Statistics of each example, float64."""
    function: Function

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.rows_NK)

    def sums(self, weights_RN: np.ndarray) -> np.ndarray:
        """Weighted sums of the statistics [R, K]; linear in the weights."""
        if isinstance(self.rows_NK, SparseRows):
            return self.rows_NK.sums(weights_RN)
        return weights_RN @ self.rows_NK

    def figures(self, weights_RN: np.ndarray) -> dict[str, np.ndarray]:
        """Figure -> its value under each weighting [R], nan where it is undefined."""
        return self.function(self.sums(weights_RN))

    def undefined(self, name: str) -> str:
        """Why the figure is nan where every example counts once."""
        return self.function.undefined(name, self.sums(once(self))[0])

    def selected(self, places_M: np.ndarray) -> Additive:
        """The tally of the examples at these places alone, in this order."""
        return replace(self, rows_NK=self.rows_NK[places_M])


@dataclass(frozen=True, kw_only=True, eq=False)
class Together:
    """Several tallies of the same examples in the same order, as one; no two have a figure of the same name."""

    parts: tuple[Tally, ...]

    def __post_init__(self) -> None:
        sizes = {part.num_examples for part in self.parts}
        assert len(sizes) == 1, f"the parts of a tally are of the same examples, got {sizes}"

    @property
    def num_examples(self) -> int:
        """N."""
        return self.parts[0].num_examples

    def figures(self, weights_RN: np.ndarray) -> dict[str, np.ndarray]:
        """The figures of all parts."""
        found: dict[str, np.ndarray] = {}
        for part in self.parts:
            more = part.figures(weights_RN)
            assert not found.keys() & more.keys(), f"two parts have {found.keys() & more.keys()}"
            found |= more
        return found

    def undefined(self, name: str) -> str:
        """The reason that the part with this figure gives."""
        owner = next(part for part in self.parts if name in part.figures(once(part)))
        return owner.undefined(name)

    def selected(self, places_M: np.ndarray) -> Together:
        """The tally of the examples at these places alone, in this order."""
        return Together(parts=tuple(part.selected(places_M) for part in self.parts))


def once(tally: Tally) -> np.ndarray:
    """The weighting [1, N] under which every example counts once."""
    return np.ones((1, tally.num_examples))


def plain_figures(tally: Tally) -> dict[str, float]:
    """Figure -> its value, nan where it is undefined. Raises UserError for a tally of no example."""
    if not tally.num_examples:
        raise UserError("there is no example to score: figures need at least one; give data that has some")
    return {name: float(values[0]) for name, values in tally.figures(once(tally)).items()}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, nan where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)
