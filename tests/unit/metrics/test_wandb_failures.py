"""Weights & Biases going wrong in every way we know, with a client of our own in its place."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from conf.errors import UserError
from train.config.monitor import MonitorConfig, WandbConfig
from train.metrics import RunIdentity, replay, weights_and_biases
from train.metrics.jsonl import JsonlWriter
from train.metrics.wandb_account import has_key, resolve_mode
from train.metrics.weights_and_biases import WandbWriter, payload

IDENTITY = RunIdentity(
    name="n", run_id="r", wandb_id="old", attempt=2, job_type="pretrain", group="g", resolved_config={}, layout={}
)
RECORD = {"kind": "train", "attempt": 2, "step": 3, "tokens": 300, "loss": 0.5, "time": 5.0}


class ClientError(Exception):
    pass


class Client:
    """Stands in for the module and for the run that it starts."""

    Error = ClientError
    url = "https://somewhere"

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.settings: dict[str, object] = {}
        self.summary: dict[str, float] = {}
        self.refuse: Callable[[str], Exception | None] = lambda run_id: None
        self.on_log: Callable[[], None] = lambda: None
        self.on_finish: Callable[[], None] = lambda: None

    def Settings(self, **settings: object) -> SimpleNamespace:  # noqa: N802 - the library's name
        return SimpleNamespace(**settings)

    def setup(self, settings: SimpleNamespace) -> None:
        pass

    def init(self, **arguments: object) -> Client:
        self.calls.append(("init", arguments))
        if error := self.refuse(str(arguments["id"])):
            raise error
        return self

    def log(self, values: dict) -> None:
        self.on_log()
        self.calls.append(("log", values))

    def finish(self, exit_code: int) -> None:
        self.on_finish()
        self.calls.append(("finish", {"exit_code": exit_code}))

    def define_metric(self, name: str, **options: object) -> None:
        self.calls.append(("define_metric", {"name": name, **options}))

    def alert(self, **arguments: object) -> None:
        self.calls.append(("alert", arguments))

    def mark_preempting(self) -> None:
        self.calls.append(("mark_preempting", {}))

    def teardown(self) -> None:
        self.calls.append(("teardown", {}))

    def of(self, name: str) -> list[dict]:
        return [values for called, values in self.calls if called == name]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    made = Client()
    monkeypatch.setitem(sys.modules, "wandb", made)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return made


def writer(run_dir: Path, said: list[str], **settings: object) -> WandbWriter:
    config = WandbConfig(**{"finish_timeout_seconds": 5.0, **settings})
    return WandbWriter(config, run_dir, identity=IDENTITY, say=said.append)


def test_a_good_run(client: Client, tmp_path: Path) -> None:
    said: list[str] = []
    run = writer(tmp_path, said, tags=("a",))
    run.write(RECORD)
    run.close("finished")
    start = client.of("init")[0]
    assert (start["id"], start["resume"], start["group"], start["job_type"]) == ("old", "allow", "g", "pretrain")
    assert (start["mode"], start["dir"], start["tags"]) == ("online", str(tmp_path), ["a"])
    assert client.of("define_metric") == [
        {"name": "train/tokens"},
        {"name": "*", "step_metric": "train/tokens"},
        {"name": "val/loss", "step_metric": "train/tokens", "summary": "min"},
    ]
    assert client.of("log")[0]["train/loss"] == 0.5
    assert [name for name, _ in client.calls][-2:] == ["finish", "teardown"]
    assert client.of("finish") == [{"exit_code": 0}]
    assert said == ["W&B: https://somewhere"]


def test_a_stopped_run_is_marked_for_going_on(client: Client, tmp_path: Path) -> None:
    writer(tmp_path, []).close("stopped")
    assert [name for name, _ in client.calls][-3:] == ["mark_preempting", "finish", "teardown"]
    assert client.of("finish") == [{"exit_code": 1}]


def test_payloads() -> None:
    assert payload({**RECORD, "lr": 0.1}) == {
        "_timestamp": 5.0,
        "train/attempt": 2,
        "train/step": 3,
        "train/tokens": 300,
        "train/loss": 0.5,
        "train/lr": 0.1,
    }
    held_out = {**RECORD, "kind": "evaluation"}
    assert payload(held_out)["val/loss"] == 0.5 and payload(held_out)["train/tokens"] == 300
    assert payload({**held_out, "name": "code"})["val/code/loss"] == 0.5
    assert payload({**held_out, "probe/copying": 0.25})["val/probe/copying"] == 0.25


def test_a_start_that_fails_is_one_line(client: Client, tmp_path: Path) -> None:
    client.refuse = lambda run_id: ClientError("no such entity\nand much more")
    said: list[str] = []
    run = writer(tmp_path, said)
    run.write(RECORD)
    run.close("finished")
    run.write(RECORD)
    assert said == ["W&B: off (no such entity); training goes on, metrics.jsonl has every value"]
    assert client.of("finish") == []


def test_an_error_of_any_other_kind_is_no_different(client: Client, tmp_path: Path) -> None:
    client.refuse = lambda run_id: AttributeError("a change of API")
    said: list[str] = []
    writer(tmp_path, said).close("finished")
    assert len(said) == 1 and "a change of API" in said[0]


def test_a_deleted_run_gets_a_new_id(client: Client, tmp_path: Path) -> None:
    client.refuse = lambda run_id: ClientError("old was previously created and deleted") if run_id == "old" else None
    saved: list[str] = []
    run = WandbWriter(WandbConfig(), tmp_path, identity=IDENTITY, say=lambda text: None, save_wandb_id=saved.append)
    run.close("finished")
    second = client.of("init")[1]
    assert second["config"]["previous_id"] == "old"
    assert saved == [second["id"]] and len(saved[0]) == 8 and saved[0].isalnum()


def test_failures_in_a_row_turn_it_off_and_single_ones_do_not(client: Client, tmp_path: Path) -> None:
    count = 0

    def fail_at_times() -> None:
        nonlocal count
        count += 1
        if count in (1, 2, 3, 4) or count > 5:
            raise OSError("broken pipe")

    client.on_log = fail_at_times
    said: list[str] = []
    run = writer(tmp_path, said)
    for _ in range(30):
        run.write(RECORD)
    run.close("finished")
    assert count == 10, "four failures, a success, five failures, and no more"
    assert [line for line in said if "off" in line] == [
        "W&B: off (broken pipe); training goes on, metrics.jsonl has every value"
    ]


@pytest.mark.parametrize("full", [True, False], ids=["queue full", "a place free"])
def test_a_service_that_hangs_neither_slows_nor_holds(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    release, hangs = threading.Event(), threading.Event()
    killed: list[bool] = []
    client.on_log = lambda: (hangs.set(), release.wait(10), None)[2]
    monkeypatch.setattr(weights_and_biases, "_kill_service", lambda: (killed.append(True), release.set()))
    monkeypatch.setattr(weights_and_biases, "QUEUE_RECORDS", 50)
    said: list[str] = []
    run = writer(tmp_path, said, finish_timeout_seconds=0.3)
    began = time.monotonic()
    run.write(RECORD)
    assert hangs.wait(5)
    for _ in range(1000 if full else 49):
        run.write(RECORD)
    assert time.monotonic() - began < 0.5
    run.close("finished")
    assert time.monotonic() - began < 3.0
    assert killed == [True]
    assert sum("does not keep up" in line for line in said) == full
    assert sum("did not end within 0.3 s" in line for line in said) == 1


def test_alerts_of_one_title_are_rate_limited(client: Client, tmp_path: Path) -> None:
    run = writer(tmp_path, [])
    for title in ("loss spike", "loss spike", "run stopped"):
        run.alert(title, "text", "warn")
    run.close("stopped")
    assert [(alert["title"], alert["level"]) for alert in client.of("alert")] == [
        ("loss spike", "WARN"),
        ("run stopped", "WARN"),
    ]


def test_alerts_can_be_turned_off(client: Client, tmp_path: Path) -> None:
    run = writer(tmp_path, [], alerts=False)
    run.alert("loss spike", "text", "warn")
    run.close("finished")
    assert client.of("alert") == []


def test_online_without_a_key_asks_nobody(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    said: list[str] = []
    writer(tmp_path, said, mode="online").close("finished")
    assert len(said) == 1 and "online needs a key" in said[0]
    assert client.of("init") == []


def test_the_mode_follows_the_key_and_the_environment(tmp_path: Path) -> None:
    auto, nowhere = WandbConfig(), {"NETRC": str(tmp_path / "none")}
    assert resolve_mode(auto, nowhere) == "offline"
    assert resolve_mode(auto, {**nowhere, "WANDB_API_KEY": "k"}) == "online"
    assert resolve_mode(auto, {**nowhere, "WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}) == "disabled"
    assert resolve_mode(WandbConfig(mode="online"), {**nowhere, "WANDB_MODE": "offline"}) == "online"


def test_a_key_in_netrc_counts_for_its_host(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert has_key({"NETRC": str(file)})
    assert not has_key({"NETRC": str(file), "WANDB_BASE_URL": "https://wandb.example.org"})
    file.write_text("machine\n")
    assert not has_key({"NETRC": str(file)})
    assert has_key({"NETRC": str(file), "WANDB_IDENTITY_TOKEN_FILE": "/token"})


def lines(run_dir: Path) -> None:
    file = JsonlWriter(run_dir / "metrics.jsonl", say=pytest.fail)
    for time_written, step in enumerate((1, 2, 2, 3), start=1):
        file.write({**RECORD, "step": step, "time": float(time_written)})
    file.close("finished")


def test_a_replay_sends_what_counts(client: Client, tmp_path: Path) -> None:
    lines(tmp_path)
    assert replay(tmp_path, MonitorConfig(), identity=IDENTITY) == ("https://somewhere", 3)
    assert (client.of("init")[0]["id"], client.of("init")[0]["resume"]) == ("old", "allow")
    assert [values["train/step"] for values in client.of("log")] == [1, 2, 3]
    assert client.of("log")[0]["_timestamp"] == 1.0


def test_a_replay_goes_on_behind_what_was_sent(client: Client, tmp_path: Path) -> None:
    """The second record was replaced by the third line, which is the newest that the service has."""
    lines(tmp_path)
    client.summary = {"_timestamp": 3.0}
    assert replay(tmp_path, MonitorConfig(), identity=IDENTITY)[1] == 1
    assert [values["train/step"] for values in client.of("log")] == [3]
    client.summary = {"_timestamp": 4.0}
    assert replay(tmp_path, MonitorConfig(), identity=IDENTITY)[1] == 0


def test_a_replay_of_a_deleted_run_keeps_its_new_id(client: Client, tmp_path: Path) -> None:
    lines(tmp_path)
    client.refuse = lambda run_id: ClientError("Run (old) was previously created and deleted") if run_id == "old" else None
    kept: list[str] = []
    replay(tmp_path, MonitorConfig(), identity=IDENTITY, save_wandb_id=kept.append)
    assert client.of("init")[1]["config"]["previous_id"] == "old"
    assert kept == [client.of("init")[1]["id"]]


def test_a_replay_says_what_it_lacks(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="folder of a run"):
        replay(tmp_path, MonitorConfig(), identity=IDENTITY)
    lines(tmp_path)
    with pytest.raises(UserError, match="mode=disabled"):
        replay(tmp_path, MonitorConfig(wandb=WandbConfig(mode="disabled")), identity=IDENTITY)
    client.refuse = lambda run_id: ClientError("permission denied")
    with pytest.raises(UserError, match="permission denied"):
        replay(tmp_path, MonitorConfig(), identity=IDENTITY)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="mode=online: needs a key"):
        replay(tmp_path, MonitorConfig(wandb=WandbConfig(mode="online")), identity=IDENTITY)
