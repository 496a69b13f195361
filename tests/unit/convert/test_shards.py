"""The streaming writer against the safetensors library; the folder that appears whole or not at all."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from conf.errors import UserError
from train.convert.publication import REPORT, UNFINISHED, Publication, Unfinished, check_apart
from train.convert.shards import Entry, ShardWriter, plan_shards, write_index

SHAPES = {"a": (3, 5), "b": (7,), "ü.weight": (2, 2, 2), "c": (40, 10), "d": (1,)}


def _entries(dtype):
    return {name: Entry(shape=shape, dtype=dtype) for name, shape in SHAPES.items()}


def _values(dtype):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [10**9, 100, 1])
def test_the_library_reads_what_was_written(tmp_path, dtype, shard_bytes):
    values, plan = _values(dtype), plan_shards(_entries(dtype), shard_bytes=shard_bytes)
    with ShardWriter(tmp_path, plan) as writer:
        for name, value in values.items():
            writer.write(name, value.float())
    write_index(tmp_path, plan)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in files] == [shard.file for shard in plan]
    read = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert read.keys() == values.keys()
    for name, value in values.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], value)
    for path, shard in zip(files, plan, strict=True):
        with safe_open(path, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
        assert path.stat().st_size == shard.bytes
        size = sum(prod(entry.shape) for entry in shard.entries.values()) * dtype.itemsize
        assert size <= shard_bytes or len(shard.entries) == 1
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(plan) > 1)
    if len(plan) > 1:
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
        assert content["weight_map"] == {name: shard.file for shard in plan for name in shard.entries}


def test_views_are_written_by_their_values(tmp_path):
    matrix = torch.arange(12.0).view(3, 4)
    plan = plan_shards({"t": Entry(shape=(4, 3), dtype=torch.float32)}, shard_bytes=10**9)
    with ShardWriter(tmp_path, plan) as writer:
        writer.write("t", matrix.T)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], matrix.T)


def test_a_missing_or_misplaced_tensor_is_never_silent(tmp_path):
    plan = plan_shards(_entries(torch.float32), shard_bytes=10**9)
    with pytest.raises(AssertionError, match="planned"), ShardWriter(tmp_path, plan) as writer:
        writer.write("b", torch.zeros(7))
    with pytest.raises(AssertionError, match="not written"), ShardWriter(tmp_path, plan) as writer:
        writer.write("a", torch.zeros(3, 5))


SOURCE = {"weights": "abc"}


def _publish(out, *, overwrite=False, content="new"):
    with Publication(out, "hf", overwrite=overwrite, source=SOURCE) as folder:
        (folder / REPORT).write_text(json.dumps({"format": "hf", "text": content}))


def test_a_folder_appears_whole(tmp_path):
    out = tmp_path / "below" / "model"
    with Publication(out, "hf", overwrite=False, source=SOURCE) as folder:
        assert folder.name == "model.partial"
        (folder / REPORT).write_text(json.dumps({"format": "hf", "text": "new"}))
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == [REPORT]
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_nothing_appears_after_an_error(tmp_path):
    out = tmp_path / "model"
    with pytest.raises(UserError, match="no good"), Publication(out, "hf", overwrite=False, source=SOURCE) as folder:
        (folder / REPORT).write_text("half")
        raise UserError("no good")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_whole_weights_for_the_same_source(tmp_path):
    out = tmp_path / "model"
    for source, kept in ((SOURCE, []), (SOURCE, ["a.safetensors"]), ({"weights": "other"}, [])):
        with pytest.raises(KeyboardInterrupt), Publication(out, "hf", overwrite=False, source=source) as folder:
            assert sorted(path.name for path in folder.iterdir() if path.name != UNFINISHED) == kept
            for name in ("a.safetensors", "b.safetensors.part", "config.json"):
                (folder / name).write_text("x")
            (folder / "tokenizer").mkdir()
            raise KeyboardInterrupt
        assert not out.exists()
    _publish(out)
    assert [path.name for path in out.iterdir()] == [REPORT]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_at_once_are_refused(tmp_path):
    out = tmp_path / "model"
    with Publication(out, "hf", overwrite=False, source=SOURCE) as folder:
        (folder / REPORT).write_text(json.dumps({"format": "hf", "text": "new"}))
        with pytest.raises(UserError, match="is being filled by another process"):
            _publish(out)
    assert json.loads((out / REPORT).read_text())["text"] == "new"


def test_an_existing_folder_is_replaced_only_when_asked_and_ours(tmp_path):
    out = tmp_path / "model"
    _publish(out, content="old")
    with pytest.raises(UserError, match="exists; give another name"):
        _publish(out)
    with pytest.raises(RuntimeError), Publication(out, "hf", overwrite=True, source=SOURCE):
        raise RuntimeError
    assert json.loads((out / REPORT).read_text())["text"] == "old"
    _publish(out, overwrite=True)
    assert json.loads((out / REPORT).read_text())["text"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no earlier conversion"):
        _publish(foreign, overwrite=True)
    assert (foreign / "chapter.txt").exists()


def test_leftovers_of_a_killed_export_are_cleared_and_nothing_else(tmp_path):
    partial = tmp_path / "model.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("not ours")
    with pytest.raises(UserError, match="is no unfinished conversion"):
        _publish(tmp_path / "model")
    assert (partial / "mine.txt").exists()
    (partial / UNFINISHED).touch()
    _publish(tmp_path / "model")
    assert not partial.exists()
    replaced = tmp_path / "model.replaced"
    replaced.mkdir()
    with pytest.raises(UserError, match="model.replaced: exists"):
        _publish(tmp_path / "model", overwrite=True)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        _publish(tmp_path / "file" / "model")


def test_what_appears_at_out_meanwhile_is_never_replaced(tmp_path):
    out = tmp_path / "model"
    with (
        pytest.raises(Unfinished, match="was not there before"),
        Publication(out, "hf", overwrite=False, source=SOURCE) as folder,
    ):
        (folder / "a.safetensors").write_text("x")
        out.mkdir()
        (out / "chapter.txt").write_text("years of work")
    assert (out / "chapter.txt").read_text() == "years of work"
    assert (tmp_path / "model.partial" / "a.safetensors").exists()


def test_a_conversion_of_the_other_kind_and_a_link_are_left_alone(tmp_path):
    out = tmp_path / "model"
    with Publication(out, "checkpoint", overwrite=False, source=SOURCE) as folder:
        (folder / REPORT).write_text(json.dumps({"format": "checkpoint"}))
    with pytest.raises(UserError, match="is no earlier conversion of this kind"):
        _publish(out, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(out)
    with pytest.raises(UserError, match="is a link"):
        _publish(link, overwrite=True)
    assert json.loads((out / REPORT).read_text())["format"] == "checkpoint"


@pytest.mark.parametrize("place", ["source", "source/within", "."])
def test_a_conversion_stays_out_of_what_it_reads(place, tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(UserError, match="is what is read, or lies within it, or around it"):
        check_apart(tmp_path / place, tmp_path / "source")
    check_apart(tmp_path / "source2", tmp_path / "source")
