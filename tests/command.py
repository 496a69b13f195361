"""`longhaul WORDS` as its users call it, without paying for imports: a process of its own that is forked, not executed.

A command and each of its ranks would spend three CPU seconds on importing torch, DeepSpeed and transformers, which is more
than most tests compute. Here the command is forked from the server of `tests.dist`, which holds them already, and what the
command itself starts as `python -P -m MODULE` is forked from it in turn. All the rest is as with real processes: arguments,
environment, working folder, files, sessions, signals, exit codes, parents that wait for their children.

What differs: /proc/PID/cmdline and /proc/PID/environ still show the server's, and a variable that a library reads while it is
imported has no effect. Where the process itself is the subject (found by its environment, killed at a given moment, run under
Slurm), start a real one. A process with threads starts real ones too: a fork may find a lock taken by one of them.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import multiprocessing.reduction
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.dist import FORKSERVER, ensure_server
from tests.timeouts import scaled

_PR_SET_PDEATHSIG = 1
MODULE_COMMAND = (sys.executable, "-P", "-m")


def longhaul(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`longhaul WORDS`; see `run_module`."""
    return run_module("tools.cli", *words, **options)


def run_module(
    module: str,
    *words: str,
    typed: str = "",
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 240.0,
) -> subprocess.CompletedProcess[str]:
    """Run `python -P -m MODULE WORDS` to its end, with `typed` as its standard input and `environment` on top of the present.

    For an installed script MODULE is its entry point, "package.module:function", and the first word its name.
    Raises TimeoutExpired after `timeout_seconds`, as the reference machine counts them.
    """
    limit = scaled(timeout_seconds)
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(typed.encode())
        stdin.seek(0)
        process = FORKSERVER.Process(
            target=_serve,
            args=(
                module,
                words,
                str(folder or Path.cwd()),
                {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                [_Descriptor(file.fileno()) for file in (stdin, stdout, stderr)],
            ),
        )
        ensure_server()
        process.start()
        try:
            process.join(limit)
            in_time = process.exitcode is not None
        finally:  # also when the test itself is ended
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()
        if not in_time:
            raise subprocess.TimeoutExpired([module, *words], limit, _text(stdout).encode(), _text(stderr).encode())
        return subprocess.CompletedProcess([module, *words], process.exitcode, _text(stdout), _text(stderr))


def _text(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


class _Descriptor:
    """An open file that travels to a process of the server."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _detach, (multiprocessing.reduction.DupFd(self.number),)


def _detach(sent: Any) -> int:
    return sent.detach()


def _serve(module: str, words: Sequence[str], folder: str, environment: dict[str, str], files: list[int]) -> None:
    """In a process of the server: become the command."""
    os.setsid()
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(folder)
    _become(module, words, environment)


def _become(module: str, words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Be `python -P -m MODULE WORDS`, as if just started: handlers, environment and open text streams are fresh."""
    code = 1
    try:
        atexit._clear()
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(environment)
        for path in reversed([part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]):
            if path not in sys.path:
                sys.path.insert(0, path)
        unbuffered = bool(environment.get("PYTHONUNBUFFERED"))
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - it stays open as long as the process
        sys.stdout = open(1, "w", buffering=1 if unbuffered or os.isatty(1) else -1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        _set_threads(environment)
        sys.argv = list(words) if ":" in module else [module, *words]
        script = [sys.executable, str(Path(sys.executable).with_name(words[0]))] if ":" in module else None
        sys.orig_argv = [*script, *words[1:]] if script else [*MODULE_COMMAND, module, *words]
        subprocess.Popen = ForkingPopen  # type: ignore[misc]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
            code = _exit_code(module)
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # nothing may run after this call: it would be the test's own program once more
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def _exit_code(module: str) -> int:
    try:
        if ":" in module:
            name, _, function = module.partition(":")
            sys.exit(getattr(importlib.import_module(name), function)())
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        print(left.code, file=sys.stderr)
        return 1
    except BaseException:  # as the interpreter does with what nobody caught
        traceback.print_exc()
        return 1
    return 0


def _set_threads(environment: Mapping[str, str]) -> None:
    """The library for threads has read its variable when the server started."""
    torch = sys.modules.get("torch")
    if torch is not None and environment.get("OMP_NUM_THREADS", "").isdigit():
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))


class ForkingPopen(subprocess.Popen):
    """A Popen that forks for `python -P -m MODULE`, with or without a program before it that ties it to its parent."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *more: Any) -> None:
        from train import companions

        words = [os.fspath(word) for word in args] if isinstance(args, list | tuple) else []
        parent = None
        if words[1:5] == ["-I", "-S", "-c", companions._DIE_WITH_PARENT]:
            parent, words = int(words[5]), words[6:]
        if tuple(words[:3]) != MODULE_COMMAND or len(list(Path("/proc/self/task").iterdir())) > 1:
            super()._execute_child(args, executable, preexec_fn, *more)  # type: ignore[misc]
            return
        names = _EXECUTE_CHILD[4:]  # behind self, args, executable and preexec_fn
        given = dict(zip(names, more, strict=True))
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._in_child(words, given, preexec_fn, parent)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))  # type: ignore[attr-defined]

    def _in_child(self, words: Sequence[str], given: Mapping[str, Any], preexec_fn: Any, parent: int | None) -> NoReturn:
        try:
            if given["start_new_session"]:
                os.setsid()
            if given["process_group"] != -1:
                os.setpgid(0, given["process_group"])
            for target, place in enumerate(("p2cread", "c2pwrite", "errwrite")):
                if given[place] != -1:
                    os.dup2(given[place], target)
            # Occupied, not closed: an inherited object that is collected later would close a number that is in use again.
            nothing = os.open(os.devnull, os.O_RDWR)
            keep = {0, 1, 2, nothing, *given["pass_fds"]}
            for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
                if number not in keep:
                    with contextlib.suppress(OSError):
                        os.dup2(nothing, number, inheritable=False)
            if given["cwd"] is not None:
                os.chdir(given["cwd"])
            if preexec_fn is not None:
                preexec_fn()
            if parent is not None:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)
            environment = os.environ if given["env"] is None else given["env"]
            _become(words[3], words[4:], {os.fsdecode(name): os.fsdecode(value) for name, value in dict(environment).items()})
        finally:
            os._exit(1)


_EXECUTE_CHILD = subprocess.Popen._execute_child.__code__.co_varnames[: subprocess.Popen._execute_child.__code__.co_argcount]
