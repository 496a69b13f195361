"""Weights of a fresh engine: the same bits in every layout, drawn only where no checkpoint gives them, never left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from conf.errors import UserError
from tests.dist import run_ranks
from tests.distributed import uneven
from tests.distributed.test_lora_checkpoints import make_store
from tests.models import initial_decoder
from train.checkpoint.manifest import DamagedCheckpoint, published
from train.checkpoint.reader import CheckpointReader
from train.config.adapter import LoraConfig
from train.engine import Engine, fragments
from train.model import philox
from train.model.adapters import all_shapes
from train.model.blueprint import Blueprint
from train.model.init import keyed_seed
from train.model.logical import logical_parameters
from train.model.transformer import Block, Reading
from train.parallel import ParallelContext, split_ranks

DORA = LoraConfig(rank=3, alpha=12, dora=True)
MODELS = {
    "llama": (uneven.TINY, None),
    "gpt2": (uneven.TINY_GPT2, None),
    "untied": (replace(uneven.TINY_GEMMA, tied_head=False), None),
    "olmo2": (uneven.TINY_OLMO2, None),
    "labels": (uneven.TINY_LABELS, None),
    "dora": (uneven.TINY, DORA),
}


def weights(context: ParallelContext, tensor: int, stages: tuple[int, ...], precision: str, name: str) -> list[dict]:
    """The fp32 weights of fresh engines, whole, by logical name; `logical_state` compares copies."""
    context, (model, lora) = split_ranks(context, tensor_parallel=tensor), MODELS[name]
    found = []
    for zero in stages:
        engine = uneven.make_engine(context, zero=zero, precision=precision, model=model, lora=lora)
        state = uneven.logical_state(engine, context) | uneven.logical_state(engine, context, frozen=True)
        found.append({key.removeprefix("weight/"): value for key, value in state.items() if key.startswith("weight/")})
    return found


LAYOUTS = {"data2": (2, 1, (1, 2, 3)), "tensor2": (2, 2, (1, 3)), "tensor2-data2": (4, 2, (3,))}
FEW = {("gpt2", "data2"), ("untied", "tensor2"), ("dora", "tensor2")}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=() if (name, layout) in FEW else pytest.mark.further)
        for name in MODELS
        for layout in LAYOUTS
    ],
)
def test_every_layout_begins_with_the_same_bits(name: str, layout: str) -> None:
    model, lora = MODELS[name]
    reading = Reading(sequence_length=uneven.SEQUENCE, document_mask=True)
    alone = logical_parameters(initial_decoder(Blueprint(model=model, lora=lora), reading, seed=7))
    ranks, tensor, stages = LAYOUTS[layout]
    for found in run_ranks(weights, ranks, tensor, stages, "fp32", name)[0]:
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            assert torch.equal(found[key], value.detach().view(value.logical.shape)), key


def dtypes(context: ParallelContext, zero: int) -> tuple[set, set, dict]:
    """Dtypes of parameters that lie in memory, of what blocks are given and of what they multiply with; the fp32 weights."""
    engine = uneven.make_engine(context, zero=zero, precision="bf16", model=uneven.TINY)
    held = {parameter.dtype for parameter in engine.module.parameters()}
    met: set[torch.dtype] = set()

    def meet(block: nn.Module, inputs: tuple) -> None:
        met.update(value.dtype for value in (inputs[0][0], block.attention.qkv.weight, block.mlp.down.weight))

    def look(linear: nn.Module, inputs: tuple) -> None:
        met.update((linear.weight.dtype, inputs[0].dtype))

    for module in engine.module.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(meet)
            module.mlp.down.register_forward_pre_hook(look)
    engine.train_step(uneven.batches_of_step(0, context), lr=0.0, step=0)
    return held, met, weights(context, 1, (zero,), "bf16", "llama")[0]


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.further), pytest.param(2, marks=pytest.mark.further), 3])
def test_bf16_computes_in_bf16_and_keeps_fp32_weights_unrounded(zero: int) -> None:
    reading = Reading(sequence_length=uneven.SEQUENCE, document_mask=True)
    alone = logical_parameters(initial_decoder(Blueprint(model=uneven.TINY), reading, seed=7))
    held, met, found = run_ranks(dtypes, 2, zero)[0]
    assert held == met == {torch.bfloat16}
    for key, value in alone.items():
        assert torch.equal(found[key], value.detach().view(value.logical.shape)), key


def bare_engine(context: ParallelContext, monkeypatch: pytest.MonkeyPatch, **more) -> Engine:
    """An engine that nothing has given weights."""
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "initialise", lambda engine, model, seed: None)
        return uneven.make_engine(context, precision="fp32", **more)


def never_without(context: ParallelContext, zero: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        engine = bare_engine(context, monkeypatch, zero=zero)
        for use in (
            lambda: engine.train_step(uneven.batches_of_step(0, context), lr=0.1, step=0),
            lambda: engine.evaluate(uneven.micro_batch([1])),
            engine.probe,
        ):
            with pytest.raises(AssertionError, match="call initialise, or load a checkpoint"):
                use()
        *pieces, left = engine.fragments()
        fragments.draw_weights(pieces, model=uneven.TINY, seed=7)
        with pytest.raises(UserError, match=f"{left.logical.name}: is not a number"):
            engine.loaded(updates=0)


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.further)])
def test_a_weight_that_nothing_gave_is_an_error(zero: int) -> None:
    run_ranks(never_without, 1, zero)


def draws(context: ParallelContext, run: str) -> list[list[str]]:
    """Names whose values are drawn: by a fresh run, a resumed one, one from a base, and fine-tunings with adapters, a head."""
    seed, elements, keys = 11, philox.elements, []
    names = [*all_shapes(uneven.TINY_LABELS, lora=DORA), *all_shapes(uneven.TINY, lora=DORA)]
    name_of = {keyed_seed(seed, name): name for name in names}
    found = []

    def watched(key: int, ranges: Iterable[range], make: Callable) -> Iterator[philox.Values]:
        keys.append(key)
        return elements(key, ranges, make)

    def taken() -> list[str]:
        drawn = [name_of[key] for key in keys]
        keys.clear()
        return drawn

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(philox, "elements", watched)
        folder = Path(run)
        engine = bare_engine(context, monkeypatch, zero=1)
        engine.initialise(uneven.TINY, seed)
        found.append(taken())
        store = make_store(folder, context, 1, base=None)
        store.save(engine, step=1, tokens=0, state={"updates": 0})
        assert store.finish().problem is None
        [written] = published(folder / "checkpoints")
        store.load_newest(bare_engine(context, monkeypatch, zero=1))
        found.append(taken())
        store.run_config = replace(store.run_config, run=replace(store.run_config.run, seed=seed))
        store.load_weights(bare_engine(context, monkeypatch, zero=3), written)
        found.append(taken())
        store.load_weights(bare_engine(context, monkeypatch, zero=1, lora=DORA), written)
        found.append(taken())
        labels = replace(uneven.TINY, labels=("no", "yes"))
        store.load_weights(bare_engine(context, monkeypatch, zero=1, model=labels), written, new=("score.weight",))
        found.append(taken())
    return found


def test_only_what_no_checkpoint_gives_is_drawn(tmp_path: Path) -> None:
    [(fresh, resumed, from_base, adapters, head)] = run_ranks(draws, 1, str(tmp_path))
    matrices = [f"blocks.{n}.{part}.weight" for n in (0, 1)
                for part in ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")]  # fmt: skip
    assert sorted(fresh) == sorted(["embedding.tokens.weight", *matrices])
    assert resumed == from_base == []
    assert sorted(adapters) == sorted(name.replace(".weight", ".lora_a.weight") for name in matrices)
    assert head == ["score.weight"]


def fall_back(context: ParallelContext, run: str) -> tuple[int, dict, dict, list[str]]:
    """Step that is resumed when the newest checkpoint breaks off while it is read; its weights, the older one's."""
    folder = Path(run)
    engine = uneven.make_engine(context, zero=3, precision="fp32")
    store = make_store(folder, context, 3, base=None)
    saved = []
    for step in (1, 2):
        engine.train_step(uneven.batches_of_step(step, context), lr=uneven.LR, step=step)
        store.save(engine, step=step, tokens=0, state={"updates": engine.updates})
        assert store.finish().problem is None
        saved.append(uneven.logical_state(engine, context))
    with pytest.MonkeyPatch.context() as monkeypatch:
        fresh = bare_engine(context, monkeypatch, zero=3)
        read, count = CheckpointReader.read_apart, []

        def breaks(reader: CheckpointReader, *arguments) -> torch.Tensor:
            count.append(reader.step)
            if reader.step == 2 and len(count) > 7:
                raise DamagedCheckpoint("the file system is gone")
            return read(reader, *arguments)

        monkeypatch.setattr(CheckpointReader, "read_apart", breaks)
        reader = store.load_newest(fresh)
        fresh.train_step(uneven.batches_of_step(2, context), lr=uneven.LR, step=2)
    return reader.step, uneven.logical_state(fresh, context), saved[1], [gone.reason for gone in store.set_aside]


def test_a_load_that_breaks_off_leaves_nothing_behind(tmp_path: Path) -> None:
    """Half of the newest checkpoint's values are in the engine when the older one is taken: a step from there is as before."""
    for step, continued, expected, reasons in run_ranks(fall_back, 2, str(tmp_path)):
        assert step == 1 and reasons == ["the file system is gone"]
        assert continued.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(continued[key], value), key
