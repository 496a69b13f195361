"""The checkpoint that a fine-tuning began with is not needed again: it is moved away, and the run goes on to the bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import UserError
from tests.dist import run_ranks
from tests.integration import finetuning
from tests.integration.finetuning import MODEL, attempt, settings
from tests.unit.convert.checkpoints import write_checkpoint
from tools.exactness import differences
from train.checkpoint.manifest import published, resolve_checkpoint
from train.config.adapter import LoraConfig
from train.config.finetune import FinetuneConfig
from train.config.method import MethodConfig
from train.initial import beginning
from train.launch import get_ready

pytestmark = pytest.mark.further

STEPS, STOP = 8, 5
FULL, LORA = MethodConfig(), MethodConfig(lora=LoraConfig(rank=4, alpha=8.0, dropout=0.1))
FROZEN = MethodConfig(frozen=("embedding.*", "blocks.0.*"))


@pytest.fixture
def pretrained(corpus: Path, tmp_path: Path) -> Path:
    """The folder of a run with one checkpoint."""
    write_checkpoint(tmp_path / "pretrained", MODEL, corpus=corpus)
    return tmp_path / "pretrained"


def ready(config: FinetuneConfig, run_dir: Path) -> FinetuneConfig:
    """What the launcher does before it starts the ranks."""
    run = replace(config.run, folder=str(run_dir.parent), name=run_dir.name)
    made = get_ready(replace(config, run=run))
    assert made is not None
    return made[0]


def run(config: FinetuneConfig, run_dir: Path, number: int = 1, ending: tuple[str, int] = ("finished", STEPS)) -> Path:
    assert run_ranks(attempt, 1, ready(config, run_dir), str(run_dir), number) == [ending]
    return run_dir


def make(checkpoint: Path, rows: Path, kind: str, method: MethodConfig, **more) -> FinetuneConfig:
    config = settings(resolve_checkpoint(str(checkpoint)), rows, kind=kind, method=method, steps=STEPS, **more)
    return replace(config, initial_checkpoint=str(checkpoint))


FILES = {
    "generation": finetuning.written_file,
    "preference": finetuning.pairs_file,
    "dialogue": finetuning.written_file,
    "classification": finetuning.labelled_file,
}


@pytest.mark.parametrize(
    ("kind", "method"),
    [("generation", FULL), ("classification", LORA), ("dialogue", FROZEN), ("preference", FULL), ("preference", LORA)],
    ids=["text-full", "labels-lora", "dialogues-frozen", "pairs-full", "pairs-lora"],
)
def test_a_run_goes_on_without_it(pretrained: Path, tmp_path: Path, kind: str, method: MethodConfig) -> None:
    rows = FILES[kind](tmp_path)
    whole = run(make(pretrained, rows, kind, method), tmp_path / "whole")
    stopping = make(pretrained, rows, kind, method, stop_at_step=STOP)
    resumed = run(stopping, tmp_path / "resumed", ending=("stopped", STOP))
    config = make(pretrained, rows, kind, method)
    pretrained.rename(tmp_path / "archive")
    run(config, resumed, number=2)
    assert differences(whole, resumed) == []
    names = [path.name for path in sorted((whole / "tokenizer").iterdir())]
    assert all((whole / "tokenizer" / name).read_bytes() == (resumed / "tokenizer" / name).read_bytes() for name in names)


def test_rows_and_tokenizer_that_are_lost_come_from_the_own_checkpoint(pretrained: Path, tmp_path: Path) -> None:
    rows = finetuning.written_file(tmp_path)
    whole = run(make(pretrained, rows, "dialogue", FULL), tmp_path / "whole")
    config = make(pretrained, rows, "dialogue", FULL)
    stopping = make(pretrained, rows, "dialogue", FULL, stop_at_step=STOP)
    resumed = run(stopping, tmp_path / "resumed", ending=("stopped", STOP))
    for folder in (pretrained, resumed / "rows", resumed / "tokenizer"):
        shutil.rmtree(folder)
    run(config, resumed, number=2)
    assert differences(whole, resumed) == []


def test_a_run_without_a_checkpoint_of_its_own_needs_it_again(pretrained: Path, tmp_path: Path) -> None:
    rows, run_dir = finetuning.written_file(tmp_path), tmp_path / "run"
    config = make(pretrained, rows, "generation", FULL)
    ready(config, run_dir)
    pretrained.rename(tmp_path / "archive")
    with pytest.raises(UserError, match=f"no such folder; .* {run_dir} was started from it and has no checkpoint of its own"):
        ready(config, run_dir)
    run(make(tmp_path / "archive", rows, "generation", FULL), run_dir)


def test_what_has_been_kept_of_it_will_do(pretrained: Path, tmp_path: Path) -> None:
    """Adapters stand on a copy of it, which is there from before the first step."""
    rows = finetuning.written_file(tmp_path)
    whole = run(make(pretrained, rows, "generation", LORA), tmp_path / "whole")
    config, run_dir = make(pretrained, rows, "generation", LORA), tmp_path / "run"
    ready(config, run_dir)
    pretrained.rename(tmp_path / "archive")
    run(replace(config, budget=replace(config.budget, stop_at_step=STOP)), run_dir, ending=("stopped", STOP))
    run(config, run_dir, number=2)
    assert differences(whole, run_dir) == []


def test_both_places_of_what_adapters_stand_on_are_empty(pretrained: Path, tmp_path: Path) -> None:
    rows, run_dir = finetuning.written_file(tmp_path), tmp_path / "run"
    config = make(pretrained, rows, "generation", LORA)
    run(replace(config, budget=replace(config.budget, stop_at_step=STOP)), run_dir, ending=("stopped", STOP))
    shutil.rmtree(run_dir / "base")
    ready(config, run_dir)
    assert (run_dir / "base/manifest.json").exists(), "it is put there again"
    shutil.rmtree(run_dir / "base")
    pretrained.rename(tmp_path / "archive")
    with pytest.raises(UserError, match=r"initial_checkpoint=.*: is gone, and .*/run/base too; .* one of these has to"):
        ready(config, run_dir)


def test_another_beginning_leaves_nothing_of_a_start_that_came_to_nothing(
    pretrained: Path, corpus: Path, tmp_path: Path
) -> None:
    rows, run_dir = finetuning.written_file(tmp_path), tmp_path / "run"
    ready(make(pretrained, rows, "generation", LORA), run_dir)
    other = write_checkpoint(tmp_path / "other", replace(MODEL, init_std=0.1), corpus=corpus)
    ready(make(other, rows, "generation", LORA), run_dir)
    assert (run_dir / "base/manifest.json").read_bytes() == (other / "manifest.json").read_bytes()


def test_the_best_of_a_run_is_what_it_was_at_the_beginning(pretrained: Path, tmp_path: Path) -> None:
    (checkpoint,) = published(pretrained / "checkpoints")
    (pretrained / "best").symlink_to(checkpoint.relative_to(pretrained))
    rows = finetuning.written_file(tmp_path)
    config = replace(make(pretrained, rows, "generation", FULL), initial_checkpoint=str(pretrained / "best"))
    run_dir = run(replace(config, budget=replace(config.budget, stop_at_step=STOP)), tmp_path / "run", ending=("stopped", STOP))
    first = str(checkpoint)
    for given in (pretrained / "best", pretrained, first):
        found = beginning(str(given), run_dir)
        assert (found.first, found.source) == (first, published(run_dir / "checkpoints")[-1])
    shutil.rmtree(pretrained)
    assert beginning(str(pretrained / "best"), run_dir).first == first
    assert beginning(str(tmp_path / "elsewhere"), run_dir).first == str(tmp_path / "elsewhere"), "and is refused as a change"
