"""A model of Hugging Face is imported, trained on in several layouts, and exported: the command line from end to end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.integration.test_tensor_parallel_command import longhaul
from train.checkpoint.reader import CheckpointReader
from train.metrics.jsonl import read_metrics

pytestmark = pytest.mark.further

STEPS = 5
WORDS = (
    "data.sequence_length=32", "batch.sequences=8", "batch.micro_batch=2", f"budget.steps={STEPS}", "schedule.warmup_steps=1",
    "optim.lr=0.003", "precision=fp32", "evaluate.max_samples=0", "monitor=quiet", "launch.device=cpu",
)  # fmt: skip
LAYOUTS = {
    "alone": [],
    "shared": ["launch.processes=4", "parallel.tensor=2", "parallel.zero=3"],
}


@pytest.fixture(scope="module")
def theirs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with the tokenizer of the corpus."""
    folder = tmp_path_factory.mktemp("theirs") / "llama"
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in (corpus / "tokenizer").glob("*.json"):
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def imported(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "llama"
    done = longhaul("import", f"hf={theirs}", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert f"imported to {out}" in done.stdout
    names = {"config.yaml", "conversion_report.json", "manifest.json", "state.json", "tokenizer", "weights.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    return out


def words_of(corpus: Path, imported: Path, folder: Path, *more: str) -> list[str]:
    return [
        *WORDS, f"initial_checkpoint={imported}", f"data.sources=[{{path: {corpus}}}]", f"run.folder={folder}", "run.name=on",
        *more,
    ]  # fmt: skip


def exported(checkpoint: Path, out: Path) -> dict[str, torch.Tensor]:
    done = longhaul("export", f"checkpoint={checkpoint}", f"out={out}")
    assert done.returncode == 0, done.stderr
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def runs(corpus: Path, imported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, layout in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(name)
        done = longhaul("pretrain", *words_of(corpus, imported, folder, *layout))
        assert done.returncode == 0, done.stderr + done.stdout
        assert f"begins with       {imported}: its model and its weights, a fresh optimizer" in done.stdout
        folders[name] = folder / "on"
    return folders


def test_untrained_it_is_what_it_was(theirs: Path, imported: Path, tmp_path: Path) -> None:
    before, after = load_file(theirs / "model.safetensors"), exported(imported, tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name


def test_training_on_is_the_same_in_every_layout(theirs: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    alone, shared = (exported(folder, tmp_path / name) for name, folder in runs.items())
    before = load_file(theirs / "model.safetensors")
    assert alone.keys() == shared.keys() == before.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, atol=1e-5, rtol=0)
        assert (tensor - before[name]).abs().max() > 1e-3, f"{name} was not trained"
    losses = [
        [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if record.get("kind") == "train"]
        for folder in runs.values()
    ]
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], abs=1e-5)
    manifest = CheckpointReader(sorted((runs["shared"] / "checkpoints").iterdir())[-1]).manifest
    assert (manifest.layout["tensor"], manifest.layout["zero"], manifest.written_by) == (2, 3, "pretrain")


def test_a_run_goes_on_when_its_first_checkpoint_is_gone(corpus: Path, imported: Path, runs: dict, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(imported, copy)
    words = words_of(corpus, copy, tmp_path)
    assert longhaul("pretrain", *words, "budget.stop_at_step=3").returncode == 85
    shutil.rmtree(copy)
    newest = sorted((tmp_path / "on" / "checkpoints").iterdir())[-1]
    shutil.copytree(newest, newest.with_name("step-00000004"))
    (newest.with_name("step-00000004") / "manifest.json").write_text("{")  # damaged, and passed over
    done = longhaul("pretrain", *words)
    assert done.returncode == 0, done.stderr + done.stdout
    resumed, undisturbed = (
        CheckpointReader(sorted((folder / "checkpoints").iterdir())[-1]) for folder in (tmp_path / "on", runs["alone"])
    )
    for name in undisturbed.names:
        assert torch.equal(resumed.read(name), undisturbed.read(name)), name


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["model=llama_tiny"], "model=llama_tiny: with initial_checkpoint="),
        (["model.num_layers=3"], "blocks.2.attention_norm.weight is absent there, and 32 in the model"),
        (["model.bias=true"], "is absent there"),
        (["model.rope={base: 700.0}"], "give its fields one by one, such as model.rope."),
        (["experiment=quickstart"], "experiment=quickstart: sets a model, and with initial_checkpoint="),
        (["model.dropout=[0.1"], "model.dropout=[0.1: not understood"),
        (["initial_checkpoint=7"], "initial_checkpoint"),
        (["initial_checkpoint=nowhere"], "initial_checkpoint=nowhere: no such folder"),
    ],
)
def test_what_does_not_fit_is_refused(words, text, corpus: Path, imported: Path, tmp_path: Path) -> None:
    refused = longhaul("pretrain", *words_of(corpus, imported, tmp_path, *words))
    assert refused.returncode == 93
    assert text in refused.stderr
    assert not list(tmp_path.iterdir())


def test_settings_that_keep_the_tensors_may_change(corpus: Path, imported: Path, tmp_path: Path) -> None:
    longer = ["model.max_positions=128", "model.rope.base=50000", "model.dropout=0.1"]
    done = longhaul("plan", *words_of(corpus, imported, tmp_path, *longer))
    assert done.returncode == 0, done.stderr
    assert "max_positions: 128" in done.stdout and "base: 50000" in done.stdout and "family: llama" in done.stdout


def test_a_corpus_of_another_tokenizer_is_refused(theirs: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(theirs, other)
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer.replace('"lstrip": false', '"lstrip": true', 1))
    assert longhaul("import", f"hf={other}", f"out={tmp_path / 'in'}", "proof=false").returncode == 0
    refused = longhaul("pretrain", *words_of(corpus, tmp_path / "in", tmp_path / "runs"))
    assert refused.returncode == 93
    assert "encoded by another tokenizer" in refused.stderr
    assert f"tokenizer.path={tmp_path / 'in' / 'tokenizer'}" in refused.stderr
