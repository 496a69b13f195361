"""The parts of a start, one by one, on the ranks of this machine: for `longhaul bench startup`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from conf.compose import as_yaml
from tools.bench_startup import BenchConfig
from train.checkpoint.manifest import (
    ADAM_KINDS,
    MANIFEST,
    Manifest,
    StoredFragment,
    StoredTensor,
    file_facts,
    folder_of,
)
from train.checkpoint.store import CheckpointStore
from train.config.model import ModelConfig
from train.config.pretrain import PretrainConfig
from train.engine import Engine, fragments
from train.initial import configure
from train.launch import settle
from train.model.cost import parameter_shapes
from train.model.init import draw
from train.model.logical import LogicalTensor
from train.model.transformer import Reading, build_layers
from train.parallel import ParallelContext
from train.stages.training import blueprint_of, optimizer_of

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a start: the slowest rank's seconds, and what one rank handled of what counts."""

    seconds: float
    cpu_seconds: float
    """More than `seconds` with several threads, much less on a machine that does other things too."""
    amount: float
    unit: str
    peak_bytes: int
    """Most memory of one rank up to its end."""


def measure(config: BenchConfig, context: ParallelContext, root: Path) -> dict[str, Part]:
    """The parts of a start, in their order, in a warm file cache; all ranks together."""
    words = [
        f"model={config.large_model}", f"data.sources=[{{path: {config.data}}}]", "data.sequence_length=64",
        f"parallel.zero={config.zero}", f"precision={config.precision}", "budget.steps=2", "schedule.warmup_steps=0",
    ]  # fmt: skip
    findings = settle(configure([*words, f"launch.processes={config.processes}"]))
    settings = findings.config
    assert isinstance(settings, PretrainConfig), "it is composed as one"
    found: dict[str, Part] = {}

    def timed(name: str, work: Callable[[], ResultT], amount: Callable[[], float], unit: str) -> ResultT:
        context.barrier()
        started, started_cpu, before = time.perf_counter(), time.process_time(), amount()
        result = work()
        times = (time.perf_counter() - started, time.process_time() - started_cpu)
        of_ranks = context.gather_to_all((*times, amount() - before, _peak_bytes()))
        seconds, cpu_seconds, amounts, peaks = (max(values) for values in zip(*of_ranks, strict=True))
        found[name] = Part(seconds=seconds, cpu_seconds=cpu_seconds, amount=amounts, unit=unit, peak_bytes=peaks)
        return result

    def check_corpus() -> None:
        if context.is_first:  # as the command does before it starts the ranks
            findings.make_ready(root)

    timed("corpus check", check_corpus, _bytes_read, "bytes")
    timed("corpus again", check_corpus, _bytes_read, "bytes")
    handled = [0]  # values of which this rank keeps fp32 weights

    def build(model: ModelConfig) -> Engine:
        of_model = replace(settings, model=model)
        engine = Engine(
            build_layers(blueprint_of(of_model, context), Reading(sequence_length=64, document_mask=True)),
            optimizer=optimizer_of(of_model),
            parallel=settings.parallel,
            precision=settings.precision,
            micro_batch=1,
            dropout_seed=1,
            context=context,
        )
        handled[0] += sum(piece.length for piece in engine.fragments())
        return engine

    def draw_values() -> None:
        fragments.draw_weights(engine.fragments(), model=settings.model, seed=settings.run.seed)
        handled[0] += sum(piece.length for piece in engine.fragments())

    def publish() -> None:
        engine.loaded(updates=0)
        handled[0] += sum(piece.length for piece in engine.fragments())

    tiny = replace(settings.model, num_layers=1, hidden_size=64, num_heads=2, num_kv_heads=None, head_size=None, ffn_size=64)
    timed("first engine", lambda: build(tiny), lambda: handled[0], "values")  # imports what DeepSpeed imports then
    engine = timed("build", lambda: build(settings.model), lambda: handled[0], "values")
    timed("values", draw_values, lambda: handled[0], "values")
    timed("publish", publish, lambda: handled[0], "values")  # out of the fp32 weights into those that are computed with
    store = CheckpointStore(
        root / "checkpoints",
        config=settings.checkpoint,
        context=context,
        run_config=settings,
        tokenizer_folder=root,
        data_fingerprint=findings.fingerprint,
    )
    if context.is_first:
        _write_checkpoint(folder_of(store.root, 1), settings, findings.fingerprint)
    context.barrier()
    timed("load", lambda: store.load_newest(engine), _bytes_read, "bytes")
    return found


def _write_checkpoint(folder: Path, settings: PretrainConfig, data_fingerprint: str) -> None:
    """A checkpoint of fresh weights and empty moments: a file for each tensor, so that this process never has two of them."""
    folder.mkdir(parents=True)
    tensors = {}
    for number, (name, shape) in enumerate(parameter_shapes(settings.model).items()):
        logical = LogicalTensor(name=name, shape=shape)
        size = 4 * logical.local_numel
        places = {
            f"{kind}/{name}": {"dtype": "F32", "shape": [logical.local_numel], "data_offsets": [size * at, size * (at + 1)]}
            for at, kind in enumerate(ADAM_KINDS)
        }
        header = json.dumps(places).encode()
        file = f"tensor-{number:05d}.safetensors"
        values = torch.zeros(logical.local_numel)
        with (folder / file).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for kind in ADAM_KINDS:
                if kind == "weight":
                    draw(settings.model, logical, settings.run.seed, values)
                stream.write(values.numpy().data)
                values.zero_()
        piece = StoredFragment(file=file, start=0, length=logical.local_numel)
        tensors[name] = StoredTensor(shape=shape, fragments=(piece,))
    (folder / "config.yaml").write_text(as_yaml(settings), encoding="utf-8")
    (folder / "state.json").write_text(json.dumps({"updates": 1}), encoding="utf-8")
    manifest = Manifest(
        step=1,
        tokens=0,
        layout={},
        data_fingerprint=data_fingerprint,
        files={path.name: file_facts(path) for path in folder.iterdir()},
        tensors=tensors,
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _bytes_read() -> float:
    """By this process, from files or their cache."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("rchar")))


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
