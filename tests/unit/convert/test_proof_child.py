"""The proof's own process: its report goes where the task says, its memory is bounded by a layer, not by the model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest

from conf.errors import UserError
from tests.unit.convert.checkpoints import GPT2, LLAMA, open_checkpoint
from train.checkpoint.reader import CheckpointReader
from train.convert import prove
from train.convert.hf_export import plan_weights, write_model
from train.convert.proof.rows import ACTIVATION_BYTES
from train.convert.prove import Task, child_environment, prove_in_child
from train.convert.publication import REPORT
from train.convert.report import read_report
from train.model.cost import num_parameters, parameter_shapes

MIB = 1 << 20
PROVE = """
import sys
from train.convert.prove import main
code = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


def _task(tmp_path: Path, model, **settings) -> Task:
    reader: CheckpointReader = open_checkpoint(tmp_path / "run", model)
    folder = tmp_path / "hf"
    folder.mkdir()
    write_model(reader, plan_weights(reader, "fp32", shard_bytes=10**9), folder, dtype="fp32")
    base = {"checkpoint": reader.path, "folder": folder, "dtype": "stored", "report": tmp_path / "report.json", "limit": None}
    return Task(**(base | settings))


def test_a_task_is_the_same_after_the_command_line(tmp_path):
    task = Task(checkpoint=tmp_path / "a b", folder=tmp_path / "hf", dtype="fp16", report=tmp_path / "r.json", limit=3)
    assert Task.parse(task.words()) == task
    assert Task.parse(replace(task, limit=None).words()).limit is None
    with pytest.raises(AssertionError, match="int4 is none of"):
        Task.parse([*task.words()[:4], "int4", "all", "safetensors", "hf"])


@pytest.mark.further
def test_the_report_is_written_elsewhere_and_the_folder_left_alone(tmp_path):
    task = _task(tmp_path, GPT2)
    before = {path.name: path.stat().st_mtime_ns for path in task.folder.iterdir()}
    report = prove_in_child(task)
    assert report["proved"]
    assert report == read_report(task.report)
    assert {path.name: path.stat().st_mtime_ns for path in task.folder.iterdir()} == before
    assert REPORT not in before


def test_every_check_that_failed_is_told(tmp_path, monkeypatch):
    # In this process, which may have loaded transformers already: what the child finds is what counts here.
    here = SimpleNamespace(run=lambda command, **_: SimpleNamespace(returncode=prove.main(command[4:])), DEVNULL=None)
    monkeypatch.setattr(prove, "subprocess", here)
    task = _task(tmp_path, LLAMA)
    path = task.folder / "config.json"
    path.write_text(path.read_text().replace("5000.0", "10000.0"))
    (task.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        prove_in_child(task)
    for part in ("tokenizer: transformers cannot read it", "logits: logits differ", "after blocks.0, only from position 1"):
        assert part in str(caught.value)
    assert not read_report(task.report)["proved"]


def _peak_bytes(task: Task) -> int:
    """Peak resident memory of the child; not of `resource`, which counts the process before exec, too."""
    command = [sys.executable, "-P", "-c", PROVE, *task.words()]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.campaign(name="memory")
def test_neither_model_is_ever_whole_in_memory(tmp_path):
    large = replace(LLAMA, num_layers=20, hidden_size=512, num_heads=8, num_kv_heads=4, ffn_size=1536, vocab_size=4000)
    small = replace(large, num_layers=2)
    layer = sum(4 * prod(shape) for name, shape in parameter_shapes(large).items() if name.startswith("blocks.0."))
    assert 4 * num_parameters(large) > 250 * MIB
    bare = _peak_bytes(_task(tmp_path / "bare", replace(LLAMA, num_layers=1)))
    few, many = (_peak_bytes(_task(tmp_path / str(model.num_layers), model)) for model in (small, large))
    print(f"above {bare / MIB:.0f} MiB: {(few - bare) / MIB:.0f} and {(many - bare) / MIB:.0f}, a layer {layer / MIB:.0f}")
    assert many - few < 2 * layer  # of 18 layers more, in each of two models
    assert many - bare < 4 * (layer + ACTIVATION_BYTES)
