"""`longhaul`, `longhaul VERB --help` and `--version`: complete, true and quick."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
import time

import pytest

from conf.compose import combinations, compose, groups, options, validate
from conf.schema import leaf_names
from tests.timeouts import scaled
from tools.cli import VERBS, load, main
from tools.help import field_documents
from train.initial import spelled_out

COMMAND = [sys.executable, "-P", "-m", "tools.cli"]
OPTIONS = ("-m", "--help")
WORDS_OF_THEIR_OWN = ("bench", "chaos", "compare", "submit", "verify-resume")  # beside those of the schema


def help_of(verb: str, capsys: pytest.CaptureFixture) -> str:
    assert main([verb, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_there_in_under_a_second(verb: str) -> None:
    """Best of three: what other processes take from the machine is not what is measured."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(
            [*COMMAND, *verb.split(), "--help"], capture_output=True, text=True, check=True, timeout=scaled(60)
        )
        seconds.append(time.perf_counter() - started)
        assert not done.stderr
        if seconds[-1] < 0.5:  # no need to show it again
            break
    assert min(seconds) < scaled(1.0), f"{verb}: {seconds}"


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_overview_lists_every_verb(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert f"  {name} " in text and verb.summary in text
    assert "--config-dir" in text and "-m" in text and max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("verb", VERBS)
def test_verb_help_shows_groups_fields_and_their_documents(verb: str, capsys: pytest.CaptureFixture) -> None:
    text = help_of(verb, capsys)
    words = " ".join(text.split())
    schema = load(VERBS[verb].schema)
    assert VERBS[verb].summary in text
    for group, default in groups(VERBS[verb].root).items():
        for option in options(group):
            assert option in text
        assert default is None or f"(default {default})" in words
    for name in leaf_names(schema):
        assert f"\n  {name}  " in text, f"{name} is not shown"
    for name, document in field_documents(schema).items():
        assert document in words, f"what {name} means is not shown"
    for example in VERBS[verb].examples:
        assert example in text
    assert max(map(len, text.splitlines())) <= 120


def test_types_and_defaults_are_spelled_as_on_the_command_line(capsys: pytest.CaptureFixture) -> None:
    text = help_of("pretrain", capsys)
    for line in (
        "  model.num_layers  int  (required)",
        "  model.num_kv_heads  int | null  = null",
        "  run.notes  str  = ''",
        "  precision  auto | bf16 | fp32 | fp8  = auto",
        "  data.document_mask  bool  = true",
        "  data.sources  [{path: ..., weight: ..., name: ...}, ...]  = [{path: data/stdlib}]",
        "  data.sources[].weight  float  = 1.0",
        "  optim.grad_clip  float | null  = 1.0",
    ):
        assert f"{line}\n" in text


def test_groups_of_the_user_are_shown(tmp_path: object, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "model").mkdir()  # type: ignore[operator]
    (tmp_path / "model/mine.yaml").write_text("family: llama\n")  # type: ignore[operator]
    assert main(["plan", "--help", "--config-dir", str(tmp_path)]) == 0
    assert " mine" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_function_root_and_schema(verb: str) -> None:
    entry = VERBS[verb]
    assert callable(load(entry.function)) and isinstance(load(entry.schema), type)
    groups(entry.root)  # reads the root file
    assert importlib.import_module(entry.function.partition(":")[0]).__name__.startswith(("slurm.", "tools.", "train."))


@pytest.mark.parametrize(
    ("verb", "example"),
    [(verb, example) for verb in VERBS for example in VERBS[verb].examples if verb not in WORDS_OF_THEIR_OWN],
)
def test_every_example_is_valid_as_a_shell_would_give_it(verb: str, example: str) -> None:
    program, named, *words = shlex.split(example)
    assert (program, named) == ("longhaul", verb)
    given = [word for word in words if word not in OPTIONS]
    for job in combinations(given) if "-m" in words else [given]:
        # What a fine-tuning takes from the checkpoint is put in its place.
        theirs = ["+model=llama_tiny", "data.sequence_length=64"] if verb == "finetune" else []
        composed = compose(VERBS[verb].root, [*spelled_out(verb, job), *theirs], verbatim=("prompt", "task.prompt"))
        validate(load(VERBS[verb].schema), composed)


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("longhaul ")
