"""Losses of every source and the answers to the probes, in every layout, against transformers reading document by document."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest, read_manifest
from tests.dist import run_ranks
from tests.models import initial_value
from tests.parity import hugging_face
from tests.unit.data_pipeline.corpora import prepared, some_texts
from train.attempt import Attempt
from train.config.model import ModelConfig
from train.config.pretrain import PretrainConfig
from train.config.training import BatchConfig, BudgetConfig, EvaluateConfig, ParallelConfig
from train.convert.keymap import KeyMap
from train.engine import Engine
from train.held_out import Evaluator
from train.metrics import NullMetrics
from train.metrics.record import Level
from train.model.logical import LogicalTensor
from train.model.transformer import Reading, build_layers
from train.parallel import ParallelContext, split_ranks
from train.plan import make_plan
from train.probes import make_probes
from train.stages.training import blueprint_of, build, optimizer_of

LENGTH, SEED = 32, 11
# Weights so wide that a loss says which text it is of, and dropout, which must not be on.
MODEL = ModelConfig(
    family="gpt2", num_layers=2, hidden_size=32, num_heads=2, ffn_size=64, max_positions=LENGTH, vocab_size=300,
    positions="learned", norm="layer", mlp="gelu", bias=True, tied_head=True, dropout=0.2, init_std=0.3,
)  # fmt: skip
LAYOUTS = [
    pytest.param(1, 1, 1, False, id="one-process"),
    pytest.param(2, 1, 3, False, id="data2-zero3", marks=pytest.mark.further),
    pytest.param(2, 2, 1, False, id="tensor2", marks=pytest.mark.further),
    pytest.param(2, 2, 3, True, id="tensor2-zero3-rows"),
    pytest.param(4, 2, 2, True, id="tensor2-data2-zero2-rows", marks=pytest.mark.further),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Three corpora of one tokenizer with different amounts of held-out text, and one with none."""
    first = prepared(tmp_path_factory.mktemp("a"), some_texts(150))
    tokenizer = TokenizerConfig(path=str(first.tokenizer_path), engine="hf")
    others = [
        prepared(tmp_path_factory.mktemp("other"), some_texts(count, seed=seed), tokenizer=tokenizer, held_out_fraction=share)
        for seed, (count, share) in enumerate(((60, 0.2), (30, 0.0), (40, 0.1)), start=1)
    ]
    return first.folder, *(manifest.folder for manifest in others)


def settings(sources: tuple[Path, ...], *, zero: int = 1, max_samples: int | None = None) -> PretrainConfig:
    named = tuple(SourceConfig(path=str(folder), name=f"s{number}") for number, folder in enumerate(sources))
    return PretrainConfig(
        model=MODEL,
        data=DataConfig(sources=named, sequence_length=LENGTH),
        batch=BatchConfig(sequences=8, micro_batch=2),
        budget=BudgetConfig(steps=10),
        parallel=ParallelConfig(zero=zero),
        precision="fp32",
        evaluate=EvaluateConfig(micro_batch=3, max_samples=max_samples),
    )


def held_out(config: PretrainConfig) -> Loader:
    return Loader(config.data, split="validation", seed=0, vocab_size=MODEL.vocab_size)


def make(context: ParallelContext, config: PretrainConfig) -> tuple[Engine, Evaluator]:
    reading = Reading(sequence_length=LENGTH, document_mask=True)
    engine = Engine(
        build_layers(blueprint_of(config, context), reading),
        optimizer=optimizer_of(config),
        parallel=config.parallel,
        precision=config.precision,
        micro_batch=2,
        dropout_seed=3,
        context=context,
    )
    engine.initialise(config.model, seed=SEED)
    return engine, Evaluator(config, context=context, engine=engine, loader=held_out(config))


def measured(context: ParallelContext, config: PretrainConfig, tensor: int, rows: bool) -> tuple[list[dict], list[int]]:
    """The records of an evaluation, and the numbers of its batches."""
    numbers: list[int] = []
    _, evaluator = make(split_ranks(context, tensor_parallel=tensor, sequence_parallel=rows), config)
    assert evaluator.missing == []
    return evaluator.run(numbers.append), numbers


@cache
def truth(sources: tuple[Path, ...], windows: tuple[int, ...]) -> tuple[dict[str, tuple], dict[str, float]]:
    """(name -> loss, targets, bytes of the first windows of a source) and the probes' figures, by transformers."""
    theirs = hugging_face.build(replace(MODEL, dropout=0.0)).eval()
    keymap, weights = KeyMap(MODEL), hugging_face.named_weights(theirs)
    for name, shape in keymap.logical_shapes.items():
        value = initial_value(MODEL, LogicalTensor(name=name, shape=shape), SEED).view(shape)
        for key, part in keymap.to_foreign(name, value).items():
            weights[key].data.copy_(part)
    sums = {
        f"s{number}": sums_of(theirs, read_manifest(folder), count)
        for number, (folder, count) in enumerate(zip(sources, windows, strict=True))
        if count
    }
    figures = {}
    tokenizer = read_manifest(sources[0]).tokenizer_path
    streams = [stream_of(read_manifest(folder))[:-1] for folder in sources if read_manifest(folder).num_tokens("validation")]
    counts_V = np.bincount(np.concatenate(streams), minlength=MODEL.vocab_size)
    for probe in make_probes(("copying", "induction", "brackets"), tokenizer, counts_V=counts_V, sequence_length=LENGTH)[0]:
        with torch.no_grad():
            answers_NSV = theirs(input_ids=torch.from_numpy(probe.tokens_NS)).logits.double().log_softmax(dim=-1).numpy()
        answers_PV = answers_NSV[probe.sequence_P, probe.place_P]
        options_PO = np.take_along_axis(answers_PV, probe.options_PO, axis=1)
        figures[f"probe/{probe.name}"] = probe.score(options_PO, answers_PV.argmax(axis=1)).mean()
        if probe.first_place_P is not None:
            at_first_PO = np.take_along_axis(answers_NSV[probe.sequence_P, probe.first_place_P], probe.options_PO, axis=1)
            figures[f"probe/{probe.name}_loss"] = -options_PO.mean()
            figures[f"probe/{probe.name}_gain"] = (options_PO - at_first_PO).mean()
    return sums, figures


def stream_of(manifest: Manifest) -> np.ndarray:
    """The held-out tokens, straight from the shards."""
    names = [manifest.folder / f"{shard.stem}.bin" for shard in manifest.shards_of("validation")]
    return np.concatenate([np.fromfile(name, dtype=manifest.dtype) for name in names]).astype(np.int64)


@torch.no_grad()
def sums_of(theirs: torch.nn.Module, manifest: Manifest, windows: int) -> tuple[float, int, int]:
    """Loss, targets and their bytes, every piece of a document read by itself."""
    stream, token_bytes = stream_of(manifest), np.load(manifest.folder / "token_bytes.npy")
    loss, targets, target_bytes = 0.0, 0, 0
    for window in range(windows):
        tokens = stream[window * LENGTH : (window + 1) * LENGTH + 1]
        ends = [place + 1 for place in np.flatnonzero(tokens == manifest.eod_id)]
        for piece in np.split(tokens, ends):  # each ends with its end-of-document, or at the window's end
            if len(piece) < 2:
                continue
            logits = theirs(input_ids=torch.from_numpy(piece[None, :-1])).logits[0].double()
            loss += torch.nn.functional.cross_entropy(logits, torch.from_numpy(piece[1:]), reduction="sum").item()
            targets += len(piece) - 1
            target_bytes += int(token_bytes[piece[1:]].sum())
    return loss, targets, target_bytes


@pytest.mark.parametrize(("ranks", "tensor", "zero", "rows"), LAYOUTS)
def test_every_source_has_its_loss_in_every_layout(
    sources: tuple[Path, ...], ranks: int, tensor: int, zero: int, rows: bool
) -> None:
    config = settings(sources, zero=zero)
    sizes = {name: len(numbers) for name, numbers in held_out(config).held_out_samples().items()}
    assert list(sizes) == ["s0", "s1", "s3"] and len(set(sizes.values())) == 3
    assert any(size % 3 for size in sizes.values()), "a last batch that is not full"
    results = run_ranks(measured, ranks, config, tensor, rows)
    check(results, sources, tuple(sizes.get(f"s{number}", 0) for number in range(4)))


def test_few_samples_are_spread(sources: tuple[Path, ...]) -> None:
    config = settings(sources, max_samples=7)
    sizes = {name: len(numbers) for name, numbers in held_out(config).held_out_samples(7).items()}
    check(run_ranks(measured, 2, config, 1, False), sources, tuple(sizes.get(f"s{number}", 0) for number in range(4)))


def check(results: list[tuple[list[dict], list[int]]], sources: tuple[Path, ...], windows: tuple[int, ...]) -> None:
    """Every rank has the same records, which are those of transformers."""
    expected, figures = truth(sources, windows)
    for records, numbers in results:
        assert numbers == list(range(len(numbers))) == results[0][1], "all ranks ask and compute equally often"
        whole, *parts = records
        assert [part["name"] for part in parts] == list(expected)
        together = tuple(np.sum(list(expected.values()), axis=0))
        for record, (loss, targets, target_bytes) in zip(records, (together, *expected.values()), strict=True):
            assert record["target_tokens"] == targets
            assert record["loss"] == pytest.approx(loss / targets, abs=1e-5)
            assert record["perplexity"] == pytest.approx(math.exp(loss / targets), rel=1e-5)
            assert record["bits_per_byte"] == pytest.approx(loss / math.log(2) / target_bytes, rel=1e-5)
        assert {key: value for key, value in whole.items() if key.startswith("probe/")} == pytest.approx(figures, abs=1e-4)
    losses = [part["loss"] for part in results[0][0]]
    assert len({round(loss, 3) for loss in losses}) == len(losses), "or a mix-up of sources would not be seen"


def undisturbed(context: ParallelContext, config: PretrainConfig) -> list[tuple[float, float]]:
    """Losses of three steps with an evaluation between them, and without."""
    curves = []
    for evaluates in (True, False):
        engine, evaluator = make(context, config)
        loader = Loader(config.data, split="train", seed=0, vocab_size=MODEL.vocab_size)
        curve = []
        for step in range(3):
            first = 4 * step + 2 * context.data_rank
            curve.append(engine.train_step([loader.micro_batch([first, first + 1])], lr=1e-2, step=step).loss)
            if evaluates:
                before = torch.get_rng_state()
                evaluator.run(lambda number: None)
                assert torch.equal(torch.get_rng_state(), before), "no random number was drawn"
                assert engine.module.reading == Reading(sequence_length=LENGTH, document_mask=True)
        curves.append(curve)
    return list(zip(*curves, strict=True))


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.further), 3])
def test_training_does_not_notice(sources: tuple[Path, ...], zero: int) -> None:
    for pairs in run_ranks(undisturbed, 2, settings(sources, zero=zero, max_samples=10)):
        assert all(with_it == without for with_it, without in pairs) and len(set(pairs)) == 3


def test_one_source_has_one_record(sources: tuple[Path, ...]) -> None:
    config = settings(sources[:1])
    config = replace(config, evaluate=replace(config.evaluate, probes=("brackets",)))
    records, _ = run_ranks(measured, 1, config, 1, False)[0]
    assert len(records) == 1 and "name" not in records[0]
    assert {key for key in records[0] if key.startswith("probe/")} == {"probe/brackets"}
    nothing = replace(config, evaluate=replace(config.evaluate, probes=()))
    assert not any("probe" in key for key in run_ranks(measured, 1, nothing, 1, False)[0][0][0])


class Told(NullMetrics):
    """Keeps what people would be told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def alert(self, title: str, text: str, level: Level = "warn") -> None:
        self.said.append((title, text))


def told_at_the_start(context: ParallelContext, config: PretrainConfig, run_dir: str) -> list[tuple[str, str]]:
    metrics = Told()
    one = Attempt(run_dir=Path(run_dir), number=1)
    trainer = build(config, context, one, metrics, plan=make_plan(config, context.world_size))
    assert trainer.examiner is not None and [probe.name for probe in trainer.examiner.probes] == ["copying", "induction"]
    return metrics.said


def test_a_probe_that_cannot_be_had_is_told_once(sources: tuple[Path, ...], tmp_path: Path) -> None:
    config = settings(sources)
    config = replace(config, data=replace(config.data, sequence_length=8))
    reason = (
        "brackets: its texts do not fit into data.sequence_length=8 tokens; leave it out of evaluate.probes to be told no more"
    )
    assert run_ranks(told_at_the_start, 1, config, str(tmp_path)) == [[("probe left out", reason)]]
