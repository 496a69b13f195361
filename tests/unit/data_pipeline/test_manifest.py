"""Manifests and the facts drawn from them: what is stored, what damage is noticed, what a run is told."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from conf.errors import ConfigError, UserError
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.facts import check_epochs, inspect_sources, verify_sources
from data_pipeline.manifest import DENSEST_WINDOWS, MANIFEST_FILE, Manifest, densest_windows, read_manifest
from tests.unit.data_pipeline.corpora import change_manifest, prepared, some_texts


def touched(lengths: list[int], window: int) -> int:
    """Most documents in a window, by trying every window."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return max(len(set(owner[start : start + window].tolist())) for start in range(len(owner)))


@pytest.mark.parametrize("seed", range(5))
def test_densest_windows_equal_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, [3, 20, 100, 400, 50][seed], size=[900, 200, 60, 20, 1][seed])
    found = densest_windows(lengths)
    for window in DENSEST_WINDOWS[:6]:
        assert found[window] == touched(lengths.tolist(), window)


def test_max_documents_is_a_bound_for_every_window(tiny: Manifest) -> None:
    lengths = []
    for shard in tiny.shards_of("train"):
        tokens = np.fromfile(tiny.folder / f"{shard.stem}.bin", dtype=tiny.dtype)
        lengths += np.diff(np.flatnonzero(tokens == tiny.eod_id), prepend=-1).tolist()
    assert sum(lengths) == tiny.num_tokens("train")
    for window in (1, 5, 31, 32, 33, 48, 64, 100, 127, 128, 300):
        bound, true = tiny.max_documents(window), touched(lengths, window)
        assert true <= bound <= max(2 * true + 2, 1)
        if window in DENSEST_WINDOWS:
            assert bound == max(true, tiny.densest["validation"][window])


def test_max_documents_beyond_the_longest_window(tiny: Manifest) -> None:
    longest = DENSEST_WINDOWS[-1]
    sparse = dataclasses.replace(tiny, densest={"train": dict.fromkeys(DENSEST_WINDOWS, 7)})
    assert sparse.max_documents(3 * longest) == 21
    assert sparse.max_documents(3 * longest + 2) == 23


def test_round_trip(tiny: Manifest) -> None:
    assert read_manifest(tiny.folder) == tiny
    assert tiny.num_tokens("train") == sum(shard.num_tokens for shard in tiny.shards_of("train"))


class TestDamage:
    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"nothing: no such prepared corpus. Prepare it again: .*longhaul prepare"):
            read_manifest(tmp_path / "nothing")

    def test_no_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"holds no manifest.json, so it is no finished corpus.*longhaul prepare"):
            read_manifest(tmp_path)

    def test_not_json(self, own_copy: Path) -> None:
        (own_copy / MANIFEST_FILE).write_text('{"format_version": 1,')
        with pytest.raises(UserError, match="manifest.json: not valid JSON"):
            read_manifest(own_copy)

    def test_other_version(self, own_copy: Path) -> None:
        change_manifest(own_copy, format_version=99)
        with pytest.raises(UserError, match="format_version=99, this Longhaul reads 1"):
            read_manifest(own_copy)

    def test_missing_field(self, own_copy: Path) -> None:
        content = json.loads((own_copy / MANIFEST_FILE).read_text())
        del content["shards"][0]["stem"]
        (own_copy / MANIFEST_FILE).write_text(json.dumps(content))
        with pytest.raises(UserError, match="manifest.json: damaged"):
            read_manifest(own_copy)

    def test_changed_by_hand(self, own_copy: Path) -> None:
        change_manifest(own_copy, eod_id=7)
        with pytest.raises(UserError, match="its fingerprint does not fit what it lists"):
            read_manifest(own_copy)

    def test_file_outside_the_folder(self, own_copy: Path) -> None:
        content = json.loads((own_copy / MANIFEST_FILE).read_text())
        content["tokenizer_files"][0]["name"] = "../../etc/passwd"
        (own_copy / MANIFEST_FILE).write_text(json.dumps(content))
        with pytest.raises(UserError, match="lists a file outside its folder: ../../etc/passwd"):
            read_manifest(own_copy)

    def test_missing_shard(self, own_copy: Path) -> None:
        (own_copy / "train-00001.bin").unlink()
        with pytest.raises(UserError, match=r"train-00001.bin: cannot be read \(No such file or directory\)"):
            read_manifest(own_copy)

    def test_truncated_shard(self, own_copy: Path) -> None:
        path = own_copy / "train-00000.bin"
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.truncate(size - 2)
        with pytest.raises(UserError, match=f"train-00000.bin: holds {size - 2} bytes, manifest.json says {size}"):
            read_manifest(own_copy)

    def test_flipped_byte_is_found_by_its_hash_alone(self, own_copy: Path) -> None:
        path = own_copy / "train-00000.bin"
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
        manifest = read_manifest(own_copy)
        with pytest.raises(UserError, match=r"train-00000.bin: its content has changed: SHA-256 differs"):
            manifest.verify("full")
        sources = (SourceConfig(path=str(own_copy)),)
        verify_sources(DataConfig(sources=sources, verify="sizes"), [manifest])
        for verify in ("once", "full"):
            with pytest.raises(UserError, match="SHA-256 differs"):
                verify_sources(DataConfig(sources=sources, verify=verify), [manifest])


class TestFacts:
    def test_figures(self, tiny: Manifest, tiny_second: Manifest) -> None:
        sources = (
            SourceConfig(path=str(tiny.folder), name="a", weight=3),
            SourceConfig(path=str(tiny_second.folder), name="b"),
        )
        facts = inspect_sources(DataConfig(sources=sources, sequence_length=32))
        assert [source.share for source in facts.sources] == [0.75, 0.25]
        assert facts.train_tokens == tiny.num_tokens("train") + tiny_second.num_tokens("train")
        assert facts.validation_tokens == tiny.num_tokens("validation") + tiny_second.num_tokens("validation")
        assert facts.vocab_size == tiny.vocab_size and facts.eod_id == tiny.eod_id
        assert facts.sources[0].train_windows == (tiny.num_tokens("train") - 1) // 32
        assert facts.sources[0].epochs(facts.sources[0].train_windows) == 0.75
        assert (
            min(s.bytes_per_token for s in facts.sources)
            <= facts.bytes_per_token
            <= max(s.bytes_per_token for s in facts.sources)
        )

    def test_epochs_beyond_the_limit(self, tiny: Manifest) -> None:
        config = DataConfig(sources=(SourceConfig(path=str(tiny.folder), name="a"),), sequence_length=32, max_epochs=2)
        facts = inspect_sources(config)
        windows = facts.sources[0].train_windows
        assert check_epochs(config, facts, total_samples=2 * windows) == {"a": 2.0}
        with pytest.raises(ConfigError, match=r"data.max_epochs=2: the run reads a 2.00 times"):
            check_epochs(config, facts, total_samples=2 * windows + 1)
        unlimited = dataclasses.replace(config, max_epochs=None)
        assert check_epochs(unlimited, facts, total_samples=100 * windows) == {"a": 100.0}

    def test_too_short_for_one_sample(self, tiny: Manifest) -> None:
        config = DataConfig(sources=(SourceConfig(path=str(tiny.folder)),), sequence_length=10**6)
        with pytest.raises(UserError, match="training tokens make no sample of data.sequence_length=1000000"):
            inspect_sources(config)

    def test_different_tokenizers(self, tiny: Manifest, tmp_path: Path) -> None:
        other = prepared(tmp_path, some_texts(50, seed=9))
        config = DataConfig(sources=(SourceConfig(path=str(tiny.folder)), SourceConfig(path=str(other.folder), name="other")))
        with pytest.raises(UserError, match=r"have different tokenizers .*tokenizer=hf tokenizer.path="):
            inspect_sources(config)

    def test_missing_source(self, tiny: Manifest, tmp_path: Path) -> None:
        config = DataConfig(sources=(SourceConfig(path=str(tiny.folder)), SourceConfig(path=str(tmp_path / "gone"))))
        with pytest.raises(UserError, match="gone: no such prepared corpus"):
            inspect_sources(config)

    def test_a_moved_corpus_is_the_same(self, tiny: Manifest, tmp_path: Path) -> None:
        moved = shutil.copytree(tiny.folder, tmp_path / "elsewhere")
        prints = {
            inspect_sources(DataConfig(sources=(SourceConfig(path=str(path), name="a"),), sequence_length=32)).fingerprint
            for path in (tiny.folder, moved)
        }
        assert len(prints) == 1
