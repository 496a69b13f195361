"""The process that writes: a rank's file out of shared memory, and, beside the first rank, what makes it a checkpoint.

It stands beside the training, so that hashing and waiting for a disk cost the step nothing. Torch-free; it is told what to
do by lines of JSON on stdin and answers each by one line on stdout. It ends when stdin closes, that is with its rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.errors import UserError
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.publication import Publication, publish

_BLOCK_BYTES = 8 * 1024**2


class WriterProcess:
    """The rank's side: starts the process, hands it work, waits for the answer."""

    def __init__(self, shared_fd: int, size: int) -> None:
        """`shared_fd`: the memory that holds the file's bytes, `size` of them."""
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "train.checkpoint.writer", str(shared_fd), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(shared_fd,),
        )

    def write(self, path: Path) -> dict[str, Any]:
        """Write the shared memory to `path`, durably; returns its bytes and sha256.

        Raises CheckpointError when it could not.
        """
        return self._ask({"do": "write", "path": str(path)})

    def publish(self, publication: Publication, reports: Sequence[Mapping[str, Any]]) -> None:
        """Make the folder a checkpoint. Raises CheckpointError when it could not."""
        self._ask({"do": "publish", "publication": publication.to_json(), "reports": list(reports)})

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.process.poll() is None

    def close(self) -> None:
        """End it; what it is doing is finished first."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _ask(self, task: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except (OSError, ValueError):
            line = b""
        if not line.endswith(b"\n"):
            code = self.process.wait()
            raise CheckpointError(f"the writing process {self.process.pid} ended with code {code} before it had written")
        answer = json.loads(line)
        if problem := answer.get("problem"):
            raise CheckpointError(problem)
        return answer


def main(arguments: Sequence[str]) -> None:
    """Serve until stdin closes."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # these ask the rank to save, and this is who saves
    with contextlib.suppress(OSError):
        os.nice(5)  # the step comes first
    fd, size = int(arguments[0]), int(arguments[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may ever be printed among the answers
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as memory:
        for line in sys.stdin:
            print(json.dumps(_done(json.loads(line), memory)), file=answers, flush=True)


def _done(task: Mapping[str, Any], memory: mmap.mmap) -> dict[str, Any]:
    try:
        if task["do"] == "write":
            return write_file(Path(task["path"]), memory)
        publish(Publication.from_json(task["publication"]), task["reports"])
    except OSError as error:
        return {"problem": f"{error.filename or task.get('path', '')}: {error.strerror or error}"}
    except UserError as error:
        return {"problem": str(error)}
    return {}


def write_file(path: Path, memory: mmap.mmap | bytes) -> dict[str, Any]:
    """Write all of `memory` to a new file and make it durable; its bytes and sha256."""
    digest = hashlib.sha256()
    view = memoryview(memory)
    try:
        with path.open("xb") as stream:
            for start in range(0, len(view), _BLOCK_BYTES):
                block = view[start : start + _BLOCK_BYTES]
                digest.update(block)
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # a failed write names no file of itself
    finally:
        view.release()
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


if __name__ == "__main__":
    main(sys.argv[1:])
