"""What flows through the steps: a document, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

Scalar = str | int | float | bool | None


class Rule(StrEnum):
    """Why something is set aside."""

    UNREADABLE = "unreadable"
    """The file or folder cannot be opened or read."""
    BROKEN_FILE = "broken_file"
    """A damaged archive or Parquet file; what came before the damage is kept."""
    UNDECODABLE = "undecodable"
    """The bytes are no text in the encoding asked for."""
    BINARY = "binary"
    """The file holds NUL bytes, so it is not text."""
    BAD_RECORD = "bad_record"
    """A JSON line that is no object."""
    NO_TEXT = "no_text"
    """The record lacks the text field, or the field holds no text."""
    TOO_SHORT = "too_short"
    """Fewer bytes than min_document_bytes."""
    EXACT_DUPLICATE = "exact_duplicate"
    """The same text as an earlier document."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text."""

    id: str
    """Where it came from: corpus name, path and, where a file holds many, the line or row. Stable from run to run."""
    source: str
    """File or data set that it was read from."""
    text: str
    """The text."""
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    """Other plain fields of its record."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Something that was set aside."""

    id: str
    """Id of the document, or of the file where no document could be made."""
    rule: Rule
    """Why, in one word."""
    reason: str
    """Why, in words."""
    text_bytes: int = 0
    """UTF-8 bytes of the text; 0 where it could not be read."""

    def as_record(self) -> dict[str, str | int]:
        """The line in rejected.jsonl."""
        return {"id": self.id, "rule": str(self.rule), "reason": self.reason, "text_bytes": self.text_bytes}
