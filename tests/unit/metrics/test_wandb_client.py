"""The real Weights & Biases client: offline, and against a small service on this machine that can be made to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.timeouts import scaled

pytestmark = pytest.mark.further

REPOSITORY = Path(__file__).resolve().parents[3]

RUN = """
import sys
from pathlib import Path
from train.config.monitor import MonitorConfig, WandbConfig
from train.metrics import Metrics, RunIdentity
identity = RunIdentity(name="first", run_id="r1", wandb_id=sys.argv[2], attempt=1, job_type="pretrain", group="g",
                       resolved_config={"model": {"hidden": 8}}, layout={"zero": 1}, notes="hello")
wandb = WandbConfig(init_timeout_seconds=3, finish_timeout_seconds=float(sys.argv[3]), tags=("t",))
metrics = Metrics(MonitorConfig(tensorboard=False, wandb=wandb), Path(sys.argv[1]), identity, 3,
                  save_wandb_id=lambda new: print("saved", new))
first = int(sys.argv[5])
for step in range(first, first + 3):
    metrics.train({"step": step, "tokens": 100 * step, "loss": 1.0 / step})
metrics.evaluation({"step": step, "loss": 0.25, "probe/copying": 0.5})
metrics.close(sys.argv[4])
print("closed")
"""
REPLAY = """
import sys
from pathlib import Path
from conf.errors import UserError
from train.config.monitor import MonitorConfig, WandbConfig
from train.metrics import RunIdentity, replay
identity = RunIdentity(name="first", run_id="r1", wandb_id="abc", attempt=1, job_type="pretrain", group="g",
                       resolved_config={"model": {"hidden": 8}}, layout={"zero": 1})
config = MonitorConfig(wandb=WandbConfig(mode="online", init_timeout_seconds=5))
try:
    place, number = replay(Path(sys.argv[1]), config, identity=identity)
    print("sent", number, "to", place)
except UserError as error:
    print(error)
"""


class Service(ThreadingHTTPServer):
    """As much of the service as a run needs; an id in `deleted` is refused, `silent` answers nothing."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.deleted: set[str] = set()
        self.silent = False
        self.buckets: list[dict[str, Any]] = []
        self.alerts: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.exit_code: int | None = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        while self.server.silent:
            time.sleep(0.05)
        if self.path == "/graphql":
            query = json.loads(body)
            self._reply(*self._graphql(query.get("operationName"), query.get("variables") or {}))
            return
        if self.path.endswith("/file_stream"):
            stream = json.loads(body)
            lines = stream.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.server.history += [json.loads(line) for line in lines]
            self.server.exit_code = stream.get("exitcode", self.server.exit_code)
        self._reply(200, {})

    do_PUT = do_POST

    def _graphql(self, operation: str, variables: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        address = f"http://127.0.0.1:{self.server.server_address[1]}"
        if operation == "UpsertBucket":
            name = variables["name"]
            if name in self.server.deleted:
                text = f"run {name} was previously created and deleted; try a new run name"
                return 409, {"errors": [{"message": text}]}
            self.server.buckets.append(variables)
            project = {"id": "p", "name": "longhaul", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "project": project}
            return 200, {"data": {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}}
        if operation == "RunResumeStatus":
            return 200, {"data": {"model": {"entity": {"id": "e", "name": "me"}, "bucket": self._sent(variables["name"])}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{address}/upload/{name}"} for name in variables["files"]]
            return 200, {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        if operation == "NotifyScriptableRunAlert":
            self.server.alerts.append(variables)
        return 200, {"data": {}}

    def _sent(self, name: str) -> dict[str, Any] | None:
        """What the service has of a run; None where it has no such run."""
        if name not in {bucket["name"] for bucket in self.server.buckets}:
            return None
        rows = [json.dumps(row) for row in self.server.history]
        summary = json.dumps(self.server.history[-1] if rows else {})
        counts = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps(rows[-1:]), "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
        return {"id": "b", "name": name, "displayName": name, "summaryMetrics": summary, "config": "{}", **counts, **tails}

    def _reply(self, code: int, tree: dict[str, Any]) -> None:
        body = json.dumps(tree).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.silent = False
        made.shutdown()


def environment_of(folder: Path, address: str | None) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "NETRC": str(folder / "none"), "HOME": str(folder)}
    if address is not None:
        environment |= {"WANDB_BASE_URL": address, "WANDB_API_KEY": "k" * 40}
    return environment


def run(
    folder: Path,
    *,
    service: Service | None,
    wandb_id: str = "abc",
    finish_seconds: float = 20.0,
    lines: int = 4,
    first_step: int = 1,
) -> str:
    """Output of a reporting process that leaves by itself; `lines`: those of metrics.jsonl afterwards."""
    outcome = "stopped" if wandb_id == "stopped" else "finished"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), wandb_id, str(finish_seconds), outcome, str(first_step)],
        env=environment_of(folder, None if service is None else f"http://127.0.0.1:{service.server_address[1]}"),
        capture_output=True,
        text=True,
        timeout=scaled(40),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "the client is silent"
    assert done.stdout.endswith("closed\n")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == lines
    return done.stdout


def replayed(folder: Path, service: Service | None, *, address: str | None = None) -> str:
    """Output of a process that sends what metrics.jsonl has."""
    address = address or f"http://127.0.0.1:{service.server_address[1]}"
    command = [sys.executable, "-c", REPLAY, str(folder)]
    done = subprocess.run(
        command, env=environment_of(folder, address), capture_output=True, text=True, timeout=scaled(60), check=True
    )
    return done.stdout


def test_offline_without_a_key(tmp_path: Path) -> None:
    assert f"W&B: offline in {tmp_path / 'wandb'}" in run(tmp_path, service=None)
    kept = list((tmp_path / "wandb").glob("offline-run-*-abc/run-abc.wandb"))
    assert len(kept) == 1 and kept[0].stat().st_size > 0
    assert not (tmp_path / "none").exists(), "no login is written"


def test_online(tmp_path: Path, service: Service) -> None:
    out = run(tmp_path, service=service, wandb_id="stopped")
    assert "/me/longhaul/runs/stopped" in out
    bucket = service.buckets[0]
    assert (bucket["name"], bucket["displayName"], bucket["notes"]) == ("stopped", "first", "hello")
    assert (bucket["groupName"], bucket["jobType"], bucket["tags"]) == ("g", "pretrain", ["t"])
    config = json.loads(bucket["config"])
    assert config["model"]["value"] == {"hidden": 8} and config["layout"]["value"] == {"zero": 1}
    rows = [(row["train/tokens"], row.get("train/loss"), row.get("val/loss")) for row in service.history]
    assert rows == [(100, 1.0, None), (200, 0.5, None), (300, 1 / 3, None), (300, None, 0.25)]
    assert service.history[-1]["val/probe/copying"] == 0.5
    metrics = json.loads(service.buckets[-1]["config"])["_wandb"]["value"]["m"]
    everything = next(metric for metric in metrics if metric.get("2") == "*")
    assert metrics[everything["5"] - 1]["1"] == "train/tokens", "the axis of all values; the client numbers from 1"
    assert [(alert["title"], alert["severity"]) for alert in service.alerts] == [("run stopped", "WARN")]
    assert service.exit_code == 1, "preempted, not finished"


def test_a_replay_of_an_offline_run_is_repeatable(tmp_path: Path, service: Service) -> None:
    """Offline, sent, sent again, gone on with, sent again: every record once, in one run."""
    run(tmp_path, service=None, lines=4)
    assert "sent 4 to " in replayed(tmp_path, service)
    assert "sent 0 to " in replayed(tmp_path, service)
    run(tmp_path, service=None, lines=8, first_step=4)
    assert "sent 4 to " in replayed(tmp_path, service)
    assert {bucket["name"] for bucket in service.buckets} == {"abc"}
    rows = [(row["train/step"], row.get("train/loss"), row.get("val/loss")) for row in service.history]
    assert rows == [
        (1, 1.0, None), (2, 0.5, None), (3, 1 / 3, None), (3, None, 0.25),
        (4, 0.25, None), (5, 0.2, None), (6, 1 / 6, None), (6, None, 0.25),
    ]  # fmt: skip
    assert service.exit_code == 0


def test_a_replay_without_the_service(tmp_path: Path) -> None:
    run(tmp_path, service=None)
    began = time.monotonic()
    said = replayed(tmp_path, None, address="http://127.0.0.1:9")
    assert "Weights & Biases: " in said and "is http://127.0.0.1:9 reachable" in said and "\n" not in said.strip()
    assert time.monotonic() - began < 30.0


def test_a_deleted_run(tmp_path: Path, service: Service) -> None:
    service.deleted.add("gone")
    out = run(tmp_path, service=service, wandb_id="gone")
    new_id = out.split("saved ")[1].split()[0]
    assert f"run gone was deleted there; going on as {new_id}" in out
    assert service.buckets[0]["name"] == new_id
    assert json.loads(service.buckets[0]["config"])["previous_id"]["value"] == "gone"
    assert len(service.history) == 4


def test_a_service_that_accepts_and_never_answers(tmp_path: Path, service: Service) -> None:
    service.silent = True
    began = time.monotonic()
    out = run(tmp_path, service=service, finish_seconds=1.0)
    assert "W&B: off (did not end within 1 s)" in out
    assert time.monotonic() - began < 8.0, "leaving does not wait either"


def test_a_run_that_was_offline_is_sent_under_its_own_id(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verb: the service has no run of that id, so it gets it; a run that is there already is not written over."""
    from tests.unit.tools.test_report import eventful, run_folder

    folder = run_folder(tmp_path / "run", eventful())
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    command = [sys.executable, "-P", "-m", "tools.cli", "report", f"run={folder}", "wandb=true"]
    refused = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=scaled(60))
    assert refused.returncode == 93 and "needs a key; set WANDB_API_KEY" in refused.stderr
    environment |= {"WANDB_BASE_URL": f"http://127.0.0.1:{service.server_address[1]}", "WANDB_API_KEY": "k" * 40}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=scaled(60))
    assert done.returncode == 0, done.stdout + done.stderr
    assert service.buckets[0]["name"] == "w1"
    sent = [row["train/tokens"] for row in service.history if "train/loss" in row]
    assert sent == [64 * step for step in range(1, 61)], "of a step that was done again the last line"
