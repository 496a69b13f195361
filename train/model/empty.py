"""torch's linear and embedding layers without values of their own: these are written to once, from elsewhere."""

from __future__ import annotations

from torch import nn


class EmptyLinear(nn.Linear):
    """A linear layer that draws nothing when it is made; on meta that would load torch's decompositions, which takes 1.5 s."""

    def reset_parameters(self) -> None:
        """Nothing: see the file."""


class EmptyEmbedding(nn.Embedding):
    """A lookup table that draws nothing when it is made."""

    def reset_parameters(self) -> None:
        """Nothing: see the file."""
