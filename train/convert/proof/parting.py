"""Where two models part: the first layer after which their hidden states differ, and at which positions.

Shapes: B sequences, S positions, T = B x S, H hidden.
"""

from __future__ import annotations

from torch import Tensor

HIDDEN_TOLERANCE = 1e-4
"""Largest difference of a position's hidden states beside their own length."""


class Parting:
    """Compares the hidden states after one layer after the other, in sequences of one length."""

    def __init__(self, length: int) -> None:
        self.place: str | None = None
        """What was found first; None: nothing differs yet."""
        self._length = length

    def compare(self, name: str, ours_TH: Tensor, theirs_TH: Tensor) -> None:
        """Hold the states after the layer `name` against each other."""
        if self.place is not None:
            return
        allowed_T = HIDDEN_TOLERANCE * ours_TH.norm(dim=1)
        parted_T = ~((ours_TH - theirs_TH).norm(dim=1) <= allowed_T)  # so that no number is a difference, too
        if parted_T.any():
            self.place = f"after {name}, {_positions(parted_T.view(-1, self._length))}"


def _positions(parted_BS: Tensor) -> str:
    count, total = int(parted_BS.sum()), parted_BS.numel()
    if count == total:
        return "at all positions"
    first = int(parted_BS.any(dim=0).nonzero()[0])
    if first > 0:
        return f"only from position {first} of a sequence on ({count} of {total} positions)"
    return f"at {count} of {total} positions"
