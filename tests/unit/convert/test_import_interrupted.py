"""What an interrupted import leaves, and what goes on with it."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.convert.test_import import QUERY, change_weights, folder, llama, refused, run
from train.checkpoint.reader import CheckpointReader
from train.convert.shards import ShardWriter

__all__ = ["folder", "llama"]  # fixtures


def test_an_interrupted_import_goes_on(folder, monkeypatch):
    undisturbed = run(folder, shard_bytes=20_000)
    expected = {path.name: path.read_bytes() for path in undisturbed.glob("*.safetensors")}
    assert len(expected) > 4
    shutil.rmtree(undisturbed)

    write, written = ShardWriter.write, []

    def interrupted(self, name, tensor):
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, shard_bytes=20_000)
    monkeypatch.setattr(ShardWriter, "write", write)
    partial = folder.parent / "out.partial"
    assert not (folder.parent / "out").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert 0 < len(kept) < len(expected)

    out = run(folder, shard_bytes=20_000)
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == expected
    assert all((out / name).stat().st_mtime_ns == time for name, time in kept.items()), "a whole file was written again"
    assert not partial.exists() and not list(out.glob("*.part")) and not (out / ".unfinished-conversion").exists()
    CheckpointReader(out).verify()


def test_an_interrupted_import_of_something_else_begins_anew(folder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.stages.hf_import.write_report", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        run(folder)
    change_weights(folder, lambda weights: weights[QUERY].mul_(2))
    out = run(folder)
    rows = CheckpointReader(out).read("blocks.1.attention.qkv.weight")[:, :3].reshape(48, 48)
    assert torch.equal(rows, load_file(folder / "model.safetensors")[QUERY])


def test_a_full_disk_is_told_before_anything_is_written(folder, monkeypatch):
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr("train.convert.publication.shutil.disk_usage", lambda _: usage)
    refused(folder, "its file system has 0 MB free; make room")


def test_a_full_disk_needs_room_only_for_what_is_missing(folder, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.stages.hf_import.write_report", stopped)
        run(folder)
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr("train.convert.publication.shutil.disk_usage", lambda _: usage)
    assert CheckpointReader(run(folder)).names
