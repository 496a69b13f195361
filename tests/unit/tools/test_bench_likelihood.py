"""The bench of likelihoods: it runs both ways, compares their answers, and says what it cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conf.errors import ConfigError, UserError
from tests.timeouts import scaled
from tests.unit.convert.checkpoints import LLAMA, write_checkpoint
from tools.bench_likelihood import LikelihoodBenchConfig, _measure, kinds_of, run
from train.checkpoint.reader import CheckpointReader
from train.convert.hf_export import plan_weights, write_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    reader = CheckpointReader(write_checkpoint(folder / "run", LLAMA))
    (folder / "hf").mkdir()
    write_model(reader, plan_weights(reader, "fp32", shard_bytes=10**9), folder / "hf", dtype="fp32")
    return folder / "hf"


def test_it_times_both_and_finds_them_equal(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LikelihoodBenchConfig(hf=str(exported), requests=6, choices=3, rounds=1, batch_sizes=(2,))
    assert run(config) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    for kind in ("lone", "choices"):
        found = report[kind]
        assert found["times_as_fast"] == pytest.approx(found["hf_seconds"] / found["longhaul_seconds"], rel=0.2)
        assert 0 <= found["largest_difference"] < 1e-4


@pytest.mark.campaign(name="benches")
def test_two_processes_share_the_requests(exported: Path) -> None:
    # A command of its own: the second process is a copy of its command line.
    command = [sys.executable, "-P", "-m", "tools.cli", "bench", "likelihood", f"hf={exported}", "requests=8", "rounds=1"]
    done = subprocess.run(
        [*command, "batch_sizes=[2]", "processes=2"], capture_output=True, text=True, timeout=scaled(300), check=True
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["processes"] == 2
    assert all(0 <= report[kind]["largest_difference"] < 1e-4 for kind in ("lone", "choices"))


def test_texts_of_each_kind() -> None:
    kinds = kinds_of(LikelihoodBenchConfig(requests=10, choices=4, shots=2))
    assert {kind: len(pairs) for kind, pairs in kinds.items()} == {"lone": 10, "choices": 10}
    questions = [context for context, _ in kinds["choices"]]
    assert questions[0] == questions[3] != questions[4], "four continuations behind each question"
    assert len({question.split("\n\n")[0] for question in questions}) == 1, "the same examples before all"
    assert kinds == kinds_of(LikelihoodBenchConfig(requests=10, choices=4, shots=2))


def test_other_answers_are_an_error() -> None:
    config = LikelihoodBenchConfig(rounds=1, batch_sizes=(1,))
    with pytest.raises(UserError, match="lone: the answers differ by 1.00e-01"):
        _measure(config, "lone", lambda: [(-10.0, True)], lambda size: [(-10.0 / 1.1, True)])


@pytest.mark.parametrize(
    ("words", "problem"),
    [({"requests": 0}, "requests=0"), ({"batch_sizes": ()}, "batch_sizes="), ({"shots": -1}, "shots=-1")],
)
def test_settings_that_make_no_sense(words: dict, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        LikelihoodBenchConfig(**words)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(UserError, match="hf=nowhere: no such folder"):
        run(LikelihoodBenchConfig(hf="nowhere"))
