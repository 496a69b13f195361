"""Text as it is shown: stop texts cut off, several samples on one console. Knows no model and no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO


class StopFilter:
    """Passes text on up to the first stop text; holds back an end that may still become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> str:
        """The part of all text so far that is now sure to be shown and was not yet."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for word in self._stop if (place := text.find(word)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        sure = len(text) - self._longest_beginning(text)
        self._held = text[sure:]
        return text[:sure]

    def flush(self) -> str:
        """What is held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a stop text."""
        longest = max((len(word) - 1 for word in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(word.startswith(text[-length:]) for word in self._stop):
                return length
        return 0


class Console:
    """Writes samples one after another; the first unfinished one grows live, the others wait."""

    def __init__(self, output: TextIO, num_samples: int, *, live: bool = True) -> None:
        self._output = output
        self._live = live
        self._waiting = [""] * num_samples
        self._finished = [False] * num_samples
        self._front = 0
        self._head()

    def show(self, sample: int, text: str) -> None:
        """More text of a sample."""
        self._waiting[sample] += text
        if self._live and text and sample == self._front:
            self._write()

    def finish(self, sample: int) -> None:
        """No more text comes for a sample."""
        self._finished[sample] = True
        while self._front < len(self._finished) and self._finished[self._front]:
            self._write()
            self._output.write("\n")
            self._front += 1
            self._head()
        if self._live and self._front < len(self._waiting):
            self._write()
        self._output.flush()

    def _head(self) -> None:
        if len(self._waiting) > 1 and self._front < len(self._waiting):
            self._output.write(f"--- sample {self._front + 1} of {len(self._waiting)} ---\n")

    def _write(self) -> None:
        self._output.write(self._waiting[self._front])
        self._waiting[self._front] = ""
        self._output.flush()
