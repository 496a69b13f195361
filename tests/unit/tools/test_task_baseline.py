"""The simple means against scikit-learn and rouge_score called by hand, on rows whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from conf.errors import ConfigError, UserError
from data_pipeline.task_config import TaskConfig, TaskSource
from tools.cli import main
from tools.task_baseline import STRENGTHS, TaskBaselineConfig, as_words, commonest, nearest, run, tfidf_labels

WORDS = {
    "cats": "purr fur whiskers milk mouse nap",
    "dogs": "bark bone leash fetch tail walk",
    "fish": "fin gill pond swim bubble",
}


def some_rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """Texts of words of their label, and as many of any."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        label = str(rng.choice(list(WORDS), p=[0.5, 0.3, 0.2]))
        own = rng.choice(WORDS[label].split(), size=2).tolist()
        any_word = rng.choice(" ".join(WORDS.values()).split(), size=3).tolist()
        rows.append({"text": " ".join([*own, *any_word]), "label": label})
    return rows


def written(path: Path, rows: Sequence[Mapping[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def task(
    tmp_path: Path, train: Sequence[Mapping[str, str]], scored: Sequence[Mapping[str, str]], **fields: object
) -> TaskConfig:
    return TaskConfig(
        data=(TaskSource(path=written(tmp_path / "train.jsonl", train)),),
        validation=(TaskSource(path=written(tmp_path / "dev.jsonl", scored)),),
        **fields,
    )


def test_labels_equal_scikit_learns(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train, scored = some_rows(120, seed=1), some_rows(60, seed=2)
    config = TaskBaselineConfig(task=task(tmp_path, train, scored, kind="classification"), out=str(tmp_path / "deep/out.json"))
    assert run(config) == 0
    report = json.loads((tmp_path / "deep/out.json").read_text())
    strength = report["facts"]["tfidf_c"]
    assert strength in STRENGTHS
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+")
    model = LogisticRegression(C=strength, max_iter=1000)
    model.fit(vectorizer.fit_transform([row["text"] for row in train]), [row["label"] for row in train])
    predicted = model.predict(vectorizer.transform([row["text"] for row in scored]))
    truths = [row["label"] for row in scored]
    found = report["scores"]["tfidf"]
    assert found["accuracy"]["value"] == pytest.approx(accuracy_score(truths, predicted))
    assert found["f1_macro"]["value"] == pytest.approx(f1_score(truths, predicted, average="macro"))
    assert found["f1_macro"]["low"] < found["f1_macro"]["value"] < found["f1_macro"]["high"]
    always = report["scores"]["majority"]
    assert always["accuracy"]["value"] == pytest.approx(truths.count("cats") / len(truths))
    assert always["f1_macro"]["value"] == pytest.approx(f1_score(truths, ["cats"] * 60, average="macro", zero_division=0))
    told = capsys.readouterr().out
    assert "120 rows to learn from, 60 to score; majority: cats" in told
    assert f"{accuracy_score(truths, predicted):.4f}" in told


def test_the_strength_is_the_best_on_the_rows_held_back() -> None:
    rows = some_rows(200, seed=3)
    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    hits = {}
    for strength in STRENGTHS:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+")
        kept = [place for place in range(200) if place % 10]
        inputs = vectorizer.fit_transform([texts[place] for place in kept])
        model = LogisticRegression(C=strength, max_iter=1000).fit(inputs, [labels[place] for place in kept])
        hits[strength] = model.score(vectorizer.transform(texts[::10]), labels[::10])
    _, chosen = tfidf_labels(texts, labels, texts[:1])
    assert hits[chosen] == max(hits.values())


def test_answers_are_scored_as_rouge_score_does(tmp_path: Path) -> None:
    train = [
        {"document": "def get_size(path): return stat(path).size", "summary": "Return the size of a file.", "name": "get_size"},
        {"document": "def add(self, x): self.items.append(x)", "summary": "Add an item to it.", "name": "add"},
        {"document": "def push(self, x): self.stack.append(x)", "summary": "Add an item to it.", "name": "push"},
    ]
    scored = [
        {"document": "def size_of(path): return stat(path).size", "summary": "Get the size of a file", "name": "size_of"},
        {"document": "def appendItem(self, item): self.items.append(item)", "summary": "append item", "name": "appendItem"},
    ]
    fields = {"kind": "generation", "prompt": "{document}", "target": "summary", "metrics": ("rouge",)}
    config = TaskBaselineConfig(task=task(tmp_path, train, scored, **fields), copy="name", out=str(tmp_path / "out.json"))
    assert run(config) == 0
    scores = json.loads((tmp_path / "out.json").read_text())["scores"]
    outputs = {
        "frequent": ["Add an item to it."] * 2,
        "copied": ["size of", "append item"],
        "nearest": ["Return the size of a file.", "Add an item to it."],
    }
    scorer = RougeScorer(["rouge1", "rougeL"])
    for name, texts in outputs.items():
        found = [scorer.score(row["summary"], text) for row, text in zip(scored, texts, strict=True)]
        for figure in ("rouge1", "rougeL"):
            mean = sum(one[figure].fmeasure for one in found) / 2
            assert scores[name][figure]["value"] == pytest.approx(mean), (name, figure)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("get_file_size", "get file size"),
        ("getFileSize", "get file size"),
        ("parseHTMLText", "parse html text"),
        ("__init__", "init"),
        ("\n  A line.\nAnother.", "A line."),
        ("close", "close"),
        ("", ""),
    ],
)
def test_names_as_words(text: str, words: str) -> None:
    assert as_words(text) == words


def test_of_equals_the_first() -> None:
    assert commonest(["b", "a", "b", "a", "c"]) == "a"
    assert nearest(["one two", "one two"], ["first", "second"], ["two one", "nothing known"]) == ["first", "first"]


def test_a_table_with_columns_and_no_held_out_label_that_was_not_learned(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train, dev = tmp_path / "train.tsv", tmp_path / "dev.tsv"
    train.write_text("good film\t1\nbad film\t0\n" * 10)
    dev.write_text("a good one\t1\na bad one\t0\n")
    words = ["task-baseline", f"task.data=[{{path: {train}}}]", f"task.validation=[{{path: {dev}}}]"]
    assert main([*words, "task.columns=[sentence,label]"]) == 0
    assert "tfidf      accuracy      1.0000" in capsys.readouterr().out
    dev.write_text("a good one\t2\n")
    assert main([*words, "task.columns=[sentence,label]"]) == 93
    assert "label '2' is none of the training rows (0, 1)" in capsys.readouterr().err


def test_rows_that_do_not_do(tmp_path: Path) -> None:
    rows = [{"text": "a cat", "label": "cats"}] * 3
    with pytest.raises(UserError, match="all rows have the label 'cats'; a classification needs two"):
        run(TaskBaselineConfig(task=task(tmp_path, rows, rows, kind="classification")))
    with pytest.raises(UserError, match="holds no row"):
        run(TaskBaselineConfig(task=task(tmp_path, [], rows, kind="classification")))
    with pytest.raises(UserError, match="no column"):
        fields = {"kind": "generation", "prompt": "{text}", "target": "label", "metrics": ("rouge",)}
        run(TaskBaselineConfig(task=task(tmp_path, rows, rows, **fields), copy="name"))


def test_settings_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose classification or generation"):
        TaskBaselineConfig(task=TaskConfig())
    rows = [{"text": "a cat", "label": "cats"}]
    with pytest.raises(ConfigError) as caught:
        TaskBaselineConfig(
            task=task(tmp_path, rows, rows, kind="classification"), copy="name", resamples=-1, confidence=1.0, seed=-1, out=""
        )
    assert len(caught.value.problems) == 5
    with pytest.raises(ConfigError, match=r"task.metrics=\[\]: needs at least one of"):
        TaskBaselineConfig(task=task(tmp_path, rows, rows, kind="generation"))
    with pytest.raises(ConfigError, match=r"task.validation=\[\]: needs the rows to score"):
        TaskBaselineConfig(task=TaskConfig(kind="classification", data=(TaskSource(path="a.jsonl"),)))
