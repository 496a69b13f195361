"""Makes the next batches in the background while the current one is in use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_POLL_SECONDS = 0.1  # how often a waiting thread looks whether it was asked to stop


class Prefetcher(Generic[ItemT, ResultT]):
    """Iterates over function(item) for each item, in order, made by one background thread at most `depth` ahead.

    An exception of `function` or of the items comes up where its result would have; close() ends the thread. Use it with
    `with`, so that a run that fails leaves no thread behind.
    """

    def __init__(self, function: Callable[[ItemT], ResultT], items: Iterable[ItemT], *, depth: int = 2) -> None:
        assert depth >= 1, "depth counts the results that may wait, at least 1"
        self._function, self._items = function, iter(items)
        self._results: queue.Queue[tuple[str, ResultT | BaseException | None]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._finished = False
        self._thread = threading.Thread(target=self._work, name="prefetcher", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[ResultT]:
        return self

    def __next__(self) -> ResultT:
        if self._finished or self._stop.is_set():
            raise StopIteration
        kind, value = self._results.get()
        if kind == "result":
            return value  # type: ignore[return-value]
        self._finished = True
        self._thread.join()
        if isinstance(value, BaseException):
            raise value
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it; results not yet taken are dropped."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Prefetcher[ItemT, ResultT]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put("result", self._function(item)):
                    return
        except BaseException as error:  # carried to the caller's thread, where it is raised again
            self._put("error", error)
        else:
            self._put("end", None)

    def _put(self, kind: str, value: ResultT | BaseException | None) -> bool:
        """Hand over a result; False when asked to stop."""
        while not self._stop.is_set():
            try:
                self._results.put((kind, value), timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
