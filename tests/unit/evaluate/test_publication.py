"""Where an evaluation is kept: whole or not at all, never over another; and the table that a person reads."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import UserError
from train.config.evaluation import EvaluationConfig
from train.config.monitor import WandbConfig
from train.evaluate import publication
from train.evaluate.publication import SHOWN_FIGURES, folder_for, publish, send_to_wandb, table
from train.scores.record import Evaluation, Example, Score, read_evaluation
from train.stoppable import Stopped

EXAMPLES = [Example(id="dev.tsv:1", output="\u4f60\u597d"), Example(id="dev.tsv:2", loss=1.5, scores={"loss": 0.5})]


def evaluation(**changes: object) -> Evaluation:
    usual = {
        "name": "sst2",
        "kind": "language",
        "model": {"path": "runs/first", "hash": "0", "step": 7, "tokens": 70, "run": "first"},
        "data": [],
        "config": {},
        "scores": {"loss": Score(value=1.5)},
        "run": {"created": 1.0},
    }
    return Evaluation(**usual | changes)  # type: ignore[arg-type]


def config(**changes: object) -> EvaluationConfig:
    return EvaluationConfig(**{"checkpoint": "runs/first"} | changes)  # type: ignore[arg-type]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestFolder:
    def test_the_first_name_that_is_free(self, tmp_path: Path) -> None:
        first = tmp_path / "evaluations/step-7"
        assert folder_for(config(), tmp_path, "step-7") == first and not first.exists()
        first.mkdir(parents=True)
        assert folder_for(config(), tmp_path, "step-7").name == "step-7-2"
        (tmp_path / "evaluations/step-7-2").write_text("a file is in the way as well")
        (tmp_path / "evaluations/step-7-3").symlink_to("nowhere")
        assert folder_for(config(), tmp_path, "step-7").name == "step-7-4"

    def test_a_given_one_must_be_new(self, tmp_path: Path) -> None:
        assert folder_for(config(out=str(tmp_path / "a/b/c")), tmp_path, "x") == tmp_path / "a/b/c"
        with pytest.raises(UserError, match=r"out=.*: exists; an evaluation never replaces another, give a folder that is not"):
            folder_for(config(out=str(tmp_path)), tmp_path, "x")

    @pytest.mark.parametrize("out", ["/dev/null/a", "file/a/b"])
    def test_where_none_can_be_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=f"{out}: cannot be made, as .* does not let you write into it; give out=FOLDER"):
            folder_for(config(out=out), tmp_path, "x")

    def test_one_that_belongs_to_somebody_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Root may write anywhere, so the answer of the system is made up."""
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        with pytest.raises(UserError, match=f"evaluations/step-7: cannot be made, as {tmp_path} does not let you"):
            folder_for(config(), tmp_path, "step-7")


class TestPublication:
    def test_all_of_it_is_there(self, tmp_path: Path) -> None:
        out = publish(evaluation(), EXAMPLES, tmp_path / "a/b", more={"lm_eval.json": "{}\n"})
        assert out == tmp_path / "a/b" and names_in(out.parent) == ["b"]
        assert names_in(out) == ["evaluation.json", "examples.jsonl", "lm_eval.json"]
        assert list(read_evaluation(out).examples()) == EXAMPLES

    @pytest.mark.parametrize("stage", ["write_examples", "write_durably"])
    @pytest.mark.parametrize("failure", [Stopped("SIGTERM"), KeyboardInterrupt(), OSError(28, "No space left on device")])
    def test_an_interruption_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, failure: BaseException
    ) -> None:
        seen = []

        def interrupted(path: Path, *_: object) -> None:
            path.write_text("{")
            seen.extend(names_in(tmp_path))
            raise failure

        monkeypatch.setattr(publication, stage, interrupted)
        expected = UserError if isinstance(failure, OSError) else type(failure)
        with pytest.raises(expected) as caught:
            publish(evaluation(), EXAMPLES, tmp_path / "out")
        assert names_in(tmp_path) == [] and seen[0].startswith(".out.") and seen[0].endswith(".partial")
        if expected is UserError:
            assert "cannot be written (No space left on device); nothing was kept" in str(caught.value)

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"file.*: cannot be written \(Not a directory\); nothing was kept"):
            publish(evaluation(), EXAMPLES, tmp_path / "file/out")

    def test_two_at_once_get_two_folders(self, tmp_path: Path) -> None:
        found: list[Path] = []
        threads = [
            threading.Thread(target=lambda: found.append(publish(evaluation(), EXAMPLES, tmp_path / "out"))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(path.name for path in found) == ["out", *(f"out-{number}" for number in range(2, 9))]
        assert names_in(tmp_path) == sorted(path.name for path in found)
        assert all(list(read_evaluation(path).examples()) == EXAMPLES for path in found)

    def test_text_that_is_no_unicode(self, tmp_path: Path) -> None:
        """A model may write half of a pair of surrogates; JSON cannot hold it, and the rest is worth keeping."""
        odd = evaluation(model={"path": "runs/\udcff"})
        out = publish(odd, [Example(id="a", output="\ud83d")], tmp_path / "out")
        assert read_evaluation(out).model["path"] == "runs/\\udcff" or read_evaluation(out).model["path"] == "runs/\udcff"
        assert [example.id for example in read_evaluation(out).examples()] == ["a"]


def test_weights_and_biases_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publication, "WandbWriter", None)
    assert send_to_wandb(config(wandb=WandbConfig(mode="disabled")), evaluation(), tmp_path) is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert send_to_wandb(config(), evaluation(), tmp_path) is None


def test_what_weights_and_biases_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, object]] = []

    class Writer:
        def __init__(self, settings: WandbConfig, folder: Path, *, identity: object, say: object) -> None:
            self.identity = identity

        def write(self, record: dict[str, object]) -> None:
            told.append(record)

        def close(self, outcome: str) -> None:
            told.append({"outcome": outcome, "identity": self.identity})

    monkeypatch.setattr(publication, "WandbWriter", Writer)
    scores = {"loss": Score(value=1.5, low=1.0, high=2.0), "mcc": Score(value=None, undefined="one class")}
    settings = config(wandb=WandbConfig(mode="offline", project="mine"))
    number = send_to_wandb(settings, evaluation(scores=scores), tmp_path / "step-7-sst2")
    record, end = told
    identity = end["identity"]
    assert (identity.wandb_id, identity.group, identity.job_type) == (number, "first", "evaluate")  # type: ignore[attr-defined]
    assert identity.name == "first step-7-sst2" and end["outcome"] == "finished"  # type: ignore[attr-defined]
    assert record["step"] == 7 and record["tokens"] == 70 and record["kind"] == "evaluation"
    figures = {name: value for name, value in record.items() if name.startswith(("loss", "mcc"))}
    assert figures == {"loss": 1.5, "loss_low": 1.0, "loss_high": 2.0}
    json.dumps(record)
    foreign = evaluation(model={"path": "models/Qwen3", "hash": "0"})
    assert send_to_wandb(settings, foreign, tmp_path) is not None
    assert told[-1]["identity"].group == "Qwen3" and told[-2]["step"] == 0  # type: ignore[attr-defined]


class TestTable:
    def test_columns_and_reasons(self) -> None:
        scores = {
            "accuracy": Score(value=0.5, low=0.25, high=0.75),
            "mcc": Score(value=None, undefined="the prediction is the same for all examples"),
            "perplexity": Score(value=1234.5),
            "loss": Score(value=2e7, low=None, high=None),
        }
        assert table(evaluation(scores=scores)) == [
            "figure           value  interval",
            "accuracy        0.5000  [0.2500, 0.7500]",
            "mcc                  -  the prediction is the same for all examples",
            "perplexity   1234.5000",
            "loss        2.0000e+07",
        ]

    def test_many_figures(self) -> None:
        scores = {f"f{number}": Score(value=1.0) for number in range(SHOWN_FIGURES + 3)}
        lines = table(evaluation(scores=scores))
        assert len(lines) == SHOWN_FIGURES + 2 and lines[-1] == "... and 3 more figures in evaluation.json"
        assert len(table(evaluation(scores=dict(list(scores.items())[:SHOWN_FIGURES])))) == SHOWN_FIGURES + 1

    def test_none(self) -> None:
        assert table(replace(evaluation(), scores={})) == ["figure  value  interval"]
