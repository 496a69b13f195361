"""How a model meets text: the ids that its tokenizer makes of it, and what stands before and behind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from conf.errors import UserError
from data_pipeline.tokenizer import Tokenizer
from train.config.model import ModelConfig
from train.inference.special import special_id


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """A model's shape and its tokenizer."""

    model: ModelConfig
    """Its shape."""
    tokenizer: Tokenizer
    opening: tuple[int, ...]
    """Ids that the model has learned to find before a text; none for our own runs."""
    endings: tuple[int, ...] = ()
    """Ids at which what it writes is complete, where that is not the end of a document alone."""

    @property
    def end_of_document(self) -> int | None:
        """Id of the token that closes a document; None where the tokenizer names none."""
        return special_id(self.tokenizer, "eos_token")

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids at which what it writes is complete."""
        end = self.end_of_document
        return self.endings or (() if end is None else (end,))

    @property
    def first(self) -> tuple[int, ...]:
        """What stands before a text that has nothing before it: the opening, or else the end of another document."""
        if self.opening:
            return self.opening
        end = self.end_of_document
        if end is None:
            raise UserError(
                f"{self.tokenizer.folder}: names neither a beginning nor an end of texts, so nothing can stand first"
            )
        return (end,)

    @property
    def known_ids(self) -> int:
        """Ids that both the model and the tokenizer know."""
        return min(self.tokenizer.vocab_size, self.model.vocab_size)

    def bytes_of_ids(self) -> np.ndarray:
        """UTF-8 bytes of every id of the model, int64 [V]; 0 for those that the tokenizer does not know.

        Raises UserError for a tokenizer whose tokens are not bytes of the text.
        """
        known = self.tokenizer.token_bytes()[: self.model.vocab_size]
        return np.pad(known, (0, self.model.vocab_size - len(known))).astype(np.int64)
