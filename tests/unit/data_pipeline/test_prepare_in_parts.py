"""A preparation whose phases are shared by several processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from conf.errors import UserError
from data_pipeline.config import CorpusConfig
from data_pipeline.manifest import read_manifest
from data_pipeline.prepare import prepare
from data_pipeline.workspace import locked
from tests.unit.data_pipeline.corpora import settings, some_texts, write_jsonl
from tests.unit.data_pipeline.test_prepare import content_of


class TestPhases:
    """Several machines share a preparation; the corpus is the one that a single process makes."""

    @staticmethod
    def sources(folder: Path) -> CorpusConfig:
        paths = [write_jsonl(folder / f"{number}.jsonl", some_texts(40, seed=number)) for number in range(5)]
        write_jsonl(folder / "5.jsonl", some_texts(10, seed=2))  # all seen before
        return CorpusConfig(name="tiny", reader="jsonl", paths=(*map(str, paths), str(folder / "5.jsonl")))

    def test_the_result_is_that_of_one_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("data_pipeline.inputs.UNIT_BYTES_RANGE", (2000, 2000))
        corpus = self.sources(tmp_path)
        base = settings(tmp_path / "unused", tmp_path / "whole", corpus=corpus)
        assert prepare(base) is not None
        shared = dataclasses.replace(base, output=str(tmp_path / "shared"))
        for phase in ("read", "choose", "encode", "publish"):
            if phase == "publish":  # which names the duplicates, and has no need of their texts for that
                for texts in (tmp_path / "shared.partial" / "documents").glob("*.jsonl.zst"):
                    texts.unlink()
            parts = 3 if phase in ("read", "encode") else 1
            for part in reversed(range(parts)):
                done = prepare(dataclasses.replace(shared, phase=phase, part=part, parts=parts))  # type: ignore[arg-type]
                assert (done is not None) == (phase == "publish")
        whole, other = content_of(tmp_path / "whole"), content_of(tmp_path / "shared")
        settings_file = "manifest.json"  # knows its output
        assert whole.keys() == other.keys()
        assert all(whole[name] == other[name] for name in whole if name != settings_file)
        assert read_manifest(tmp_path / "whole").fingerprint == read_manifest(tmp_path / "shared").fingerprint
        assert prepare(base) is not None and prepare(shared) is not None, "both are finished"

    @pytest.mark.parametrize(("phase", "before"), [("choose", "read"), ("encode", "read"), ("publish", "read")])
    def test_a_phase_that_comes_too_early_is_refused(self, tmp_path: Path, phase: str, before: str) -> None:
        base = settings(tmp_path / "unused", tmp_path / "out", corpus=self.sources(tmp_path))
        with pytest.raises(UserError, match=f"phase={phase}: comes after phase={before}"):
            prepare(dataclasses.replace(base, phase=phase))  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()

    def test_encoding_waits_for_the_choice_and_publishing_for_the_encoding(self, tmp_path: Path) -> None:
        base = settings(tmp_path / "unused", tmp_path / "out", corpus=self.sources(tmp_path))
        prepare(dataclasses.replace(base, phase="read"))
        with pytest.raises(UserError, match="phase=encode: comes after phase=choose"):
            prepare(dataclasses.replace(base, phase="encode"))
        prepare(dataclasses.replace(base, phase="choose"))
        with pytest.raises(UserError, match="phase=publish: comes after phase=encode"):
            prepare(dataclasses.replace(base, phase="publish"))

    def test_what_an_older_version_has_read_is_taken(self, tmp_path: Path) -> None:
        """It left the ids with the texts alone."""
        base = settings(tmp_path / "unused", tmp_path / "out", corpus=self.sources(tmp_path))
        whole = prepare(dataclasses.replace(base, output=str(tmp_path / "whole")))
        for phase in ("read", "choose", "encode", "publish"):
            done = prepare(dataclasses.replace(base, phase=phase))  # type: ignore[arg-type]
            for ids in (tmp_path / "out.partial" / "documents").glob("*.ids.jsonl"):
                ids.unlink()
        assert whole is not None and done is not None
        assert (done.folder / "rejected.jsonl").read_bytes() == (whole.folder / "rejected.jsonl").read_bytes()

    def test_parts_may_be_at_work_together_and_a_whole_not_beside_them(self, tmp_path: Path) -> None:
        output = tmp_path / "out"
        with locked(output, shared=True), locked(output, shared=True), pytest.raises(UserError, match="is at work"):
            locked(output).__enter__()
