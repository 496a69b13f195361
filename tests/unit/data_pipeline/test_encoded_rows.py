"""The folder of encoded rows: what is read is what was written, when it is used again, and what is said of a damaged one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import UserError
from data_pipeline import encoded_rows, verified
from data_pipeline.config import Verify
from data_pipeline.encoded_rows import EncodedRows, read_encoded
from data_pipeline.manifest import SPLITS
from data_pipeline.row_preparation import _check_ids
from data_pipeline.tokenizer import Tokenizer
from tests.unit.data_pipeline.labelled import json_lines, prepared, task_of, tokenizer_in

PAIRS = [{"prompt": f"the user asks {number}:", "completion": f" {'one ' * (number % 5)}{number}"} for number in range(60)]
GOOD = {"prompt": "a", "completion": "b"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


class TestFolder:
    def made(self, path: Path, tokenizer: Tokenizer, **changes: object) -> EncodedRows:
        task = task_of("generation", json_lines(path / "a.jsonl", *PAIRS))
        return prepared(task, tokenizer, path / "rows", validation_fraction=0.2, **changes)

    def test_what_is_read_is_what_was_written(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        encoded = self.made(tmp_path, tokenizer)
        assert read_encoded(tmp_path / "rows") == encoded
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "rows"]
        assert encoded.endings == (tokenizer.end_of_document()[0],)
        assert encoded.tokenizer_folder == tokenizer.folder.resolve()

    def test_is_used_again(self, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        encoded = self.made(tmp_path, tokenizer)
        monkeypatch.setattr("data_pipeline.row_preparation.write_encoded", None)
        assert self.made(tmp_path, tokenizer) == encoded
        with pytest.raises(TypeError):
            self.made(tmp_path, tokenizer, sequence_length=65)

    def test_a_later_start_hashes_nothing(self, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(verify: Verify = "once") -> list[str]:
            """Names of what is hashed, once looked at and once put to use."""
            del hashed[:]
            assert prepared(task, tokenizer, tmp_path / "rows", validation_fraction=0.2, verify=verify) == encoded
            assert read_encoded(tmp_path / "rows", verify=verify, remember=True) == encoded
            return sorted(hashed)

        def counted(path: Path, progress: Callable[[int], object] | None = None) -> str:
            hashed.append(path.name)
            return original(path, progress)

        record = tmp_path / "rows" / "verified.json"
        hashed: list[str] = []
        original = verified.sha256_of
        encoded = self.made(tmp_path, tokenizer)
        monkeypatch.setattr(verified, "sha256_of", counted)
        task = task_of("generation", tmp_path / "a.jsonl")
        rows = sorted(path.name for path in (tmp_path / "rows").iterdir() if path.name != "rows.json")
        read_encoded(tmp_path / "rows", verify="full")
        assert not record.exists(), "who only looks leaves a run as it is"
        assert start() == sorted([*rows, *rows])
        assert start() == []
        os.utime(tmp_path / "rows" / "train-order.npy", ns=(0, 0))
        os.utime(tmp_path / "a.jsonl", ns=(0, 0))
        assert start() == ["a.jsonl", "train-order.npy", "train-order.npy"]
        assert start("full") == ["a.jsonl", *rows]
        assert start("sizes") == ["a.jsonl"], "which had another time when it was encoded"

    def test_of_an_older_version(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        """Neither the files that were read nor the largest id are known, so both are found out."""
        encoded = self.made(tmp_path, tokenizer)
        assert encoded.max_token_id == max(encoded.arrays(split).labels_N.max() for split in SPLITS)
        path = tmp_path / "rows" / "rows.json"
        content = json.loads(path.read_text())
        for name in ("read", "max_token_id"):
            del content[name]
        path.write_text(json.dumps(content))
        task = task_of("generation", tmp_path / "a.jsonl")
        again = prepared(task, tokenizer, tmp_path / "rows", validation_fraction=0.2)
        assert again == replace(encoded, read=(), max_token_id=None)
        with pytest.raises(UserError, match=r"the rows hold token .*, the model knows ids below 3"):
            _check_ids(again, 3, tokenizer)
        path.write_text(json.dumps(content | {"read": [{"path": 1}]}))
        with pytest.raises(UserError, match=r"rows.json: damaged \(KeyError"):
            prepared(task, tokenizer, tmp_path / "rows", validation_fraction=0.2)

    @pytest.mark.parametrize(
        "changes", [{"sequence_length": 32}, {"packing": False}, {"targets": "all"}, {"seed": 1}, {"opening": (3,)}]
    )
    def test_is_made_anew_for_other_settings(self, tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, object]) -> None:
        before = self.made(tmp_path, tokenizer).fingerprint
        assert self.made(tmp_path, tokenizer, **changes).fingerprint != before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "rows"]

    def test_what_becomes_of_bad_rows_makes_no_other_rows(
        self, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoded = self.made(tmp_path, tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr("data_pipeline.row_preparation.write_encoded", None)
            assert self.made(tmp_path, tokenizer, bad_rows="drop") == encoded

    def test_rows_of_which_bad_ones_were_left_out_stop(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        def made(bad_rows: str) -> EncodedRows:
            return prepared(task, tokenizer, tmp_path / "rows", bad_rows=bad_rows)

        task = task_of("generation", json_lines(tmp_path / "a.jsonl", GOOD, {"prompt": "b", "completion": ""}))
        encoded = made("drop")
        with pytest.raises(UserError, match=r"a.jsonl:2: its answer is empty"):
            made("stop")
        assert made("drop") == encoded
        json_lines(tmp_path / "a.jsonl", GOOD)
        assert made("stop").fingerprint != encoded.fingerprint, "what the files hold counts"

    def test_is_made_anew_for_other_data(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        task = task_of("generation", json_lines(tmp_path / "a.jsonl", GOOD))
        before = prepared(task, tokenizer, tmp_path / "rows")
        json_lines(tmp_path / "a.jsonl", GOOD | {"completion": "c"})
        after = prepared(task, tokenizer, tmp_path / "rows")
        assert before.fingerprint != after.fingerprint
        assert tokenizer.decode([*after.arrays("train").tokens_N.tolist()]) == "ac"
        moved = tmp_path / "elsewhere"
        moved.mkdir()
        shutil.move(tmp_path / "a.jsonl", moved / "a.jsonl")
        assert prepared(task_of("generation", moved / "a.jsonl"), tokenizer, tmp_path / "rows") == after

    @pytest.mark.parametrize("name", ["train-tokens.npy", "validation.jsonl", "token_bytes.npy"])
    def test_damage(self, tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
        self.made(tmp_path, tokenizer)
        path = tmp_path / "rows" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match=rf"{name}: its content has changed: SHA-256 .* of rows.json. Remove"):
            self.made(tmp_path, tokenizer)
        read_encoded(tmp_path / "rows", verify="sizes")
        path.write_bytes(whole[:-1])
        with pytest.raises(UserError, match=rf"{name}: holds .* rows.json says .*: cut off or changed"):
            read_encoded(tmp_path / "rows", verify="sizes")
        path.unlink()
        with pytest.raises(UserError, match=rf"{name}: cannot be read \(No such file"):
            read_encoded(tmp_path / "rows")

    @pytest.mark.parametrize(("name", "is_seen"), [("train-tokens.npy", False), ("validation.jsonl", True)])
    def test_damage_of_what_is_held_out(self, tmp_path: Path, tokenizer: Tokenizer, name: str, is_seen: bool) -> None:
        rows = self.made(tmp_path, tokenizer).validation_rows()
        path = tmp_path / "rows" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        if is_seen:
            with pytest.raises(UserError, match=rf"{name}: its content has changed"):
                read_encoded(tmp_path / "rows", split="validation")
        else:
            assert read_encoded(tmp_path / "rows", split="validation").validation_rows() == rows

    def test_the_first_held_out_rows_alone(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        encoded = self.made(tmp_path, tokenizer)
        rows = encoded.validation_rows()
        lines = (tmp_path / "rows" / "validation.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "rows" / "validation.jsonl").write_text("".join(lines[:2]) + "no row")
        assert (encoded.validation_rows(2), encoded.validation_rows(limit=0)) == (rows[:2], []) and len(rows) > 2

    def test_no_folder(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        with pytest.raises(UserError, match="rows: holds no rows.json, so it has no encoded rows. Remove"):
            read_encoded(tmp_path / "rows")
        self.made(tmp_path, tokenizer)
        (tmp_path / "rows" / "rows.json").write_text('{"format_version": 1}')
        with pytest.raises(UserError, match="rows.json: damaged"):
            read_encoded(tmp_path / "rows")

    def test_an_interrupted_write_leaves_what_was_there(
        self, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = self.made(tmp_path, tokenizer)

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(encoded_rows, "write_json", interrupted)
            with pytest.raises(KeyboardInterrupt):
                self.made(tmp_path, tokenizer, sequence_length=32)
        assert read_encoded(tmp_path / "rows") == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "rows"]
