"""Weights & Biases: the only importer of wandb. During training all that talks to it runs in one background thread.

Training must not notice whether the service is there: starting has a timeout, values pass through a bounded queue,
repeated failures turn the writer off with one line, finishing has a timeout, and metrics.jsonl has it all anyway.
"""

from __future__ import annotations

import os
import queue
import secrets
import string
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from conf.errors import UserError
from train.config.monitor import MonitorConfig, WandbConfig
from train.metrics.jsonl import FILE_NAME, read_metrics
from train.metrics.record import Level, Output, Record, RunIdentity, Value
from train.metrics.wandb_account import Mode, has_key, resolve_mode

if TYPE_CHECKING:
    from wandb import Run

QUEUE_RECORDS = 20_000
"""Records that wait for the service, some 20 MB; what comes beyond them is not sent."""
_FAILURES_IN_A_ROW = 5
_TEARDOWN_SECONDS = 5.0
_ALERT_INTERVAL_SECONDS = 600.0
_REFUSALS = ("previously created and deleted", "already exists")
_AXES = ("step", "tokens", "samples", "attempt")

Say = Callable[[str], None]


class WandbWriter:
    """Sends records in the background; never raises, never waits but for a bounded time in `close`."""

    def __init__(
        self,
        config: WandbConfig,
        run_dir: Path,
        *,
        identity: RunIdentity,
        say: Say,
        save_wandb_id: Callable[[str], None] | None = None,
    ) -> None:
        """`save_wandb_id` is called, from the background, with the new id when the run had to get one."""
        self._config = config
        self._run_dir = run_dir
        self._identity = identity
        self._say = say
        self._save_wandb_id = save_wandb_id
        self._queue: queue.Queue[Callable[[Run], None] | None] = queue.Queue(maxsize=QUEUE_RECORDS)
        self._off = threading.Event()
        self._num_dropped = 0
        self._last_alert: dict[str, float] = {}
        self._outcome = "crashed"
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        values = payload(record)
        self._put(lambda run: run.log(values))

    def outputs(self, step: int, outputs: Sequence[Output]) -> None:
        """A table: one row a held-out row, its scores beside it."""
        names = list(dict.fromkeys(name for output in outputs for name in output.scores))
        columns = ["id", "input", "truth", "output", *names]
        rows = [[one.id, one.input, one.truth, one.output, *map(one.scores.get, names)] for one in outputs]
        self._put(lambda run: run.log({"val/outputs": _load_wandb().Table(columns=columns, data=rows), "train/step": step}))

    def alert(self, title: str, text: str, level: Level) -> None:
        if not self._config.alerts:
            return
        now = time.monotonic()
        if now - self._last_alert.get(title, -_ALERT_INTERVAL_SECONDS) < _ALERT_INTERVAL_SECONDS:
            return
        self._last_alert[title] = now
        self._put(lambda run: run.alert(title=title, text=text, level=level.upper()))

    def _put(self, action: Callable[[Run], None]) -> None:
        if self._off.is_set():
            return
        try:
            self._queue.put_nowait(action)
        except queue.Full:
            self._num_dropped += 1
            if self._num_dropped == 1:
                self._say("W&B: does not keep up, values are dropped there; metrics.jsonl has every value")

    def close(self, outcome: str) -> None:
        """Send what waits and end the run, within `finish_timeout_seconds`."""
        self._outcome = outcome
        deadline = time.monotonic() + self._config.finish_timeout_seconds
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._queue.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._turn_off(f"did not end within {self._config.finish_timeout_seconds:g} s")
            _kill_service()
            self._ask_to_end()
            self._thread.join(_TEARDOWN_SECONDS)

    def _ask_to_end(self) -> None:
        """Empty the queue, which nobody fills any more, so that the thread finds its end and not one value more."""
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._queue.put_nowait(None)

    def _work(self) -> None:
        # The broad excepts in this thread are its purpose: whatever a service and its client come up with, from a
        # broken pipe to a change of API, the answer is the same.
        try:
            run = self._start()
            if run is not None:
                self._send(run)
        except Exception as error:
            self._turn_off(_first_line(error))
        # Here, where `close` bounds it. Left to wandb's exit hook it holds the process, seen: 12 s for a service
        # that accepts and never answers.
        try:
            _end_service()
        except Exception as error:
            self._turn_off(_first_line(error))

    def _send(self, run: Run) -> None:
        failures = 0
        while (action := self._queue.get()) is not None:
            try:
                action(run)
                failures = 0
            except Exception:  # a call that failed now may succeed later; a row of them ends the sending
                failures += 1
                if failures >= _FAILURES_IN_A_ROW or self._off.is_set():
                    raise
        finish_run(run, self._outcome)

    def _start(self) -> Run | None:
        mode = resolve_mode(self._config, os.environ)
        if mode == "disabled":
            self._off.set()
            return None
        if mode == "online" and not has_key(os.environ):
            # Asked here, because wandb.init would ask on the terminal and wait.
            self._turn_off("online needs a key: set WANDB_API_KEY, or run `wandb login` once")
            return None
        run, new_id = start_run(self._config, self._run_dir, identity=self._identity, mode=mode, resume="allow")
        if new_id is not None:
            self._say(f"W&B: run {self._identity.wandb_id} was deleted there; going on as {new_id}")
            if self._save_wandb_id is not None:
                self._save_wandb_id(new_id)
        place = run.url if mode == "online" else f"offline in {self._run_dir / 'wandb'}; `wandb sync` sends it"
        self._say(f"W&B: {place}")
        return run

    def _turn_off(self, reason: str) -> None:
        if not self._off.is_set():
            self._off.set()
            self._say(f"W&B: off ({reason}); training goes on, metrics.jsonl has every value")


def _load_wandb() -> ModuleType:
    # The client reports on itself and, when the process leaves, waits 10 s and more for a service that is not there.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def start_run(
    config: WandbConfig,
    run_dir: Path,
    *,
    identity: RunIdentity,
    mode: Mode,
    resume: Literal["allow", "never"],
) -> tuple[Run, str | None]:
    """Open the run in Weights & Biases; the second value is its new id where its own could not be used.

    An id that was deleted there is refused for ever, and with `resume="never"` so is one that is in use: the run
    then gets a new one, with the old one in its config as previous_id. Raises what wandb raises.
    """
    wandb = _load_wandb()

    def start(run_id: str, extra: dict[str, Any]) -> Run:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group or identity.group,
            job_type=config.job_type or identity.job_type,
            name=identity.name,
            notes=identity.notes or None,
            tags=list(config.tags),
            id=run_id,
            resume=resume,
            mode=mode,
            dir=str(run_dir),
            config={
                **identity.resolved_config,
                "layout": identity.layout,
                "run_id": identity.run_id,
                "attempt": identity.attempt,
                **extra,
            },
            allow_val_change=True,  # a resumed run may have another layout, and has another attempt
            save_code=False,
            settings=settings,
        )

    new_id: str | None = None
    settings = wandb.Settings(
        console="off",  # our logs are in files; wrapping stdout from a thread would slow every print
        silent=True,
        init_timeout=config.init_timeout_seconds,
    )
    wandb.setup(settings=settings)  # silent before the first run too
    (run_dir / "wandb").mkdir(parents=True, exist_ok=True)  # else wandb falls back to a temporary folder
    try:
        run = start(identity.wandb_id, {})
    except wandb.Error as error:
        if not _id_is_refused(error):
            raise
        new_id = new_wandb_id()
        run = start(new_id, {"previous_id": identity.wandb_id})
    run.define_metric("train/tokens")
    # Not W&B's own step: it must grow, so that after a rollback all values up to the old step would be dropped.
    run.define_metric("*", step_metric="train/tokens")
    run.define_metric("val/loss", step_metric="train/tokens", summary="min")
    return run, new_id


def new_wandb_id() -> str:
    """An id for a run, as long as those W&B makes: made once and kept in run.json."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def finish_run(run: Run, outcome: str) -> None:
    """End the run there: finished, preempted (to be gone on with) or failed."""
    if outcome == "stopped":
        run.mark_preempting()
    run.finish(exit_code=0 if outcome == "finished" else 1)


def replay(
    run_dir: Path,
    config: MonitorConfig,
    *,
    identity: RunIdentity,
    save_wandb_id: Callable[[str], None] | None = None,
) -> tuple[str, int]:
    """Send the records that count to the run's own place; returns its address, or its folder when offline, and how many
    records went there.

    What the service has already is not sent again, be it from an earlier replay, one that was cut off, or the training
    itself: records carry their true times, and only those behind the newest that it has are sent. `save_wandb_id` is
    called with a new id when the own one was deleted there.
    Raises UserError when it cannot be done; unlike during training, here nothing else is.
    """
    records = sorted(read_metrics(run_dir / FILE_NAME), key=lambda record: float(record["time"]))
    mode = resolve_mode(config.wandb, os.environ)
    if mode == "disabled":
        raise UserError("monitor.wandb.mode=disabled: nothing can be sent; give online or offline")
    if mode == "online" and not has_key(os.environ):
        raise UserError("monitor.wandb.mode=online: needs a key; set WANDB_API_KEY, run `wandb login` once, or give offline")
    wandb = _load_wandb()
    try:
        run, new_id = start_run(config.wandb, run_dir, identity=identity, mode=mode, resume="allow")
        if new_id is not None and save_wandb_id is not None:
            save_wandb_id(new_id)
        newest = run.summary.get("_timestamp")
        if newest is not None:
            records = [record for record in records if float(record["time"]) > float(newest)]
        for record in tqdm(records, desc="records", unit="record", disable=None, leave=False):
            run.log(payload(record))
        place = run.url if mode == "online" else str(run_dir / "wandb")
        run.finish(exit_code=0)
    except wandb.Error as error:
        service = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
        raise UserError(
            f"Weights & Biases: {_first_line(error)}; is {service} reachable and the key its own? "
            "The same command goes on behind what was sent"
        ) from error
    return place, len(records)


def payload(record: Record) -> dict[str, Value]:
    """The record as W&B takes it: train/..., val/... or val/NAME/..., the axes under train/ in both."""
    section = "train"
    if record["kind"] == "evaluation":
        section = f"val/{record['name']}" if record.get("name") else "val"
    values: dict[str, Value] = {"_timestamp": float(record["time"])}  # a replay keeps the true times
    for key, value in record.items():
        if key not in ("kind", "name", "time") and not isinstance(value, str):
            values[f"train/{key}" if key in _AXES else f"{section}/{key}"] = value
    return values


def _id_is_refused(error: Exception) -> bool:
    """Whether the service refuses the id itself. It has no code for this, only words."""
    text = str(error).lower()
    return any(words in text for words in _REFUSALS)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _end_service() -> None:
    """End the helper process of wandb and take its exit hook away."""
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        wandb.teardown()


def _kill_service() -> None:
    """Kill the helper process of wandb, whatever it waits for."""
    import psutil

    for child in psutil.Process().children():
        try:
            if child.name().startswith("wandb-core"):
                child.kill()
        except psutil.NoSuchProcess:
            pass
