"""Checkpoints that hold what trains, and name their base: resumed to the bit, under any layout, merged by the reader."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.config import DataConfig
from tests.dist import run_ranks
from tests.distributed import uneven
from tests.distributed.test_lora import DORA, FEW, LORA, Layout
from train.checkpoint.manifest import CheckpointError, published, read_manifest
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.store import CheckpointStore
from train.config.adapter import LoraConfig
from train.config.model import ModelConfig
from train.config.pretrain import PretrainConfig
from train.config.training import BudgetConfig, CheckpointConfig, ParallelConfig, ScheduleConfig
from train.inference.load import load_decoder
from train.model.adapters import adapter_shapes, is_adapter, trained_shapes
from train.model.cost import parameter_shapes
from train.parallel import ParallelContext, split_ranks

pytestmark = pytest.mark.further

HALF = 4
Case = tuple[LoraConfig | None, tuple[str, ...]]
CASES: dict[str, Case] = {
    "lora": (replace(LORA, dropout=0.1), ()),
    "dora": (DORA, ()),
    "few": (FEW, ()),
    "frozen": (None, ("embedding.*", "blocks.0.*")),
}
LAYOUTS: list[Layout] = [(1, 1, 2, False), (2, 1, 2, False), (3, 1, 2, False), (1, 2, 1, True), (2, 2, 2, False)]


def make_store(
    run: Path,
    context: ParallelContext,
    zero: int,
    *,
    base: Path | None,
    precision: str = "fp32",
    model: ModelConfig = uneven.TINY,
) -> CheckpointStore:
    tokenizer = (base or run) / "tokenizer"
    if context.is_first and base is None:
        tokenizer.mkdir(parents=True, exist_ok=True)
        (tokenizer / "tokenizer.json").write_text("{}")
    context.barrier()
    config = PretrainConfig(
        model=model,
        data=DataConfig(sequence_length=uneven.SEQUENCE),
        budget=BudgetConfig(steps=2 * HALF),
        parallel=ParallelConfig(zero=zero),
        schedule=ScheduleConfig(kind="constant"),
        precision=precision,
    )
    return CheckpointStore(
        run / "checkpoints",
        config=CheckpointConfig(),
        context=context,
        run_config=config,
        tokenizer_folder=tokenizer,
        data_fingerprint="none",
        base=base,
    )


def steps(engine, context: ParallelContext, first: int, last: int) -> list[float]:
    return [
        engine.train_step(uneven.batches_of_step(step, context), lr=uneven.LR, step=step).loss for step in range(first, last)
    ]


def write_base(context: ParallelContext, run: str, seed_steps: int) -> None:
    engine = uneven.make_engine(context, zero=1, precision="fp32")
    steps(engine, context, 0, seed_steps)
    store = make_store(Path(run), context, 1, base=None)
    store.save(engine, step=seed_steps, tokens=0, state={"updates": engine.updates})
    assert store.finish().problem is None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of all weights."""
    run = tmp_path_factory.mktemp("base")
    run_ranks(write_base, 1, str(run), 3)
    return published(run / "checkpoints")[0]


def everything(engine, context: ParallelContext) -> dict[str, torch.Tensor]:
    return uneven.logical_state(engine, context) | uneven.logical_state(engine, context, frozen=True)


def write(context: ParallelContext, runs: list[str], names: list[str], layout: Layout, precision: str) -> list[tuple]:
    """Begin from the base, train, save in the middle, train on: what was begun with, and the undisturbed second half."""
    zero, tensor, _, rows = layout
    context = split_ranks(context, tensor_parallel=tensor, sequence_parallel=rows)
    found = []
    for run, name in zip(runs, names, strict=True):
        lora, frozen = CASES[name]
        engine = uneven.make_engine(context, zero=zero, precision=precision, lora=lora, frozen=frozen)
        store = make_store(Path(run), context, zero, base=Path(run) / "base", precision=precision)
        assert store.load_newest(engine) is None
        store.load_weights(engine, Path(run) / "base")
        begun = everything(engine, context)
        steps(engine, context, 0, HALF)
        store.save(engine, step=HALF, tokens=0, state={"updates": engine.updates})
        assert store.finish().problem is None
        found.append((begun, steps(engine, context, HALF, 2 * HALF), everything(engine, context)))
    return found


def resume(context: ParallelContext, runs: list[str], names: list[str], layout: Layout, precision: str) -> list[tuple]:
    """Go on from each run's checkpoint in a fresh engine."""
    zero, tensor, _, rows = layout
    context = split_ranks(context, tensor_parallel=tensor, sequence_parallel=rows)
    found = []
    for run, name in zip(runs, names, strict=True):
        lora, frozen = CASES[name]
        engine = uneven.make_engine(context, zero=zero, precision=precision, lora=lora, frozen=frozen)
        for fragment in (*engine.fragments(), *engine.frozen_fragments()):  # what is not loaded must show
            for tensor in fragment.tensors.values():
                tensor.fill_(7.0)
        store = make_store(Path(run), context, zero, base=Path(run) / "base", precision=precision)
        assert store.load_newest(engine) is not None
        found.append((steps(engine, context, HALF, 2 * HALF), everything(engine, context)))
    return found


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, dict[str, tuple[Path, tuple]]]:
    """Of every layout and case: the run's folder, and what `write` has told of it."""
    found = {}
    for layout in LAYOUTS:
        runs = [tmp_path_factory.mktemp(name) for name in CASES]
        for run in runs:
            shutil.copytree(base, run / "base")
        told = run_ranks(write, layout[1] * layout[2], [str(run) for run in runs], list(CASES), layout, "fp32")[0]
        found[layout] = dict(zip(CASES, zip(runs, told, strict=True), strict=True))
    return found


def checkpoint_of(run: Path) -> Path:
    return published(run / "checkpoints")[-1]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "zero{}-tensor{}-data{}-rows{}".format(*layout))
def test_a_run_begins_with_its_base_and_goes_on_to_the_bit(written, base: Path, layout: Layout) -> None:
    reader = CheckpointReader(base)
    for other in dict.fromkeys([layout, LAYOUTS[-1]]):
        runs = [str(run) for run, _ in written[other].values()]
        resumed = run_ranks(resume, layout[1] * layout[2], runs, list(CASES), layout, "fp32")[0]
        for (name, (_, (begun, losses, state))), (new_losses, new_state) in zip(written[other].items(), resumed, strict=True):
            for key, value in begun.items():
                kind, _, logical = key.partition("/")
                if kind == "weight" and not is_adapter(logical):
                    assert torch.equal(value, reader.read(logical)), f"{name}: {logical} does not begin as in the base"
            if other == layout:
                assert new_losses == losses, name
                assert new_state.keys() == state.keys() and all(torch.equal(new_state[key], state[key]) for key in state)
            elif name != "lora":  # dropout is exact under the same layout
                near = {"rtol": 0, "atol": 1e-5}
                torch.testing.assert_close(torch.tensor(new_losses), torch.tensor(losses), **near)
                for key, value in state.items():
                    torch.testing.assert_close(new_state[key], value, **near, msg=lambda t, k=f"{name} {key}": f"{k}: {t}")


@pytest.mark.parametrize(
    "layout",
    [
        (1, 1, 2, False),
        *(pytest.param(layout, marks=pytest.mark.campaign(name="layouts")) for layout in [(3, 1, 2, False), (1, 2, 1, True)]),
    ],
)
def test_bf16_goes_on_to_the_bit(base: Path, tmp_path: Path, layout: Layout) -> None:
    runs = [tmp_path / name for name in CASES]
    for run in runs:
        shutil.copytree(base, run / "base")
    arguments = ([str(run) for run in runs], list(CASES), layout, "bf16")
    told, resumed = (run_ranks(function, 2, *arguments)[0] for function in (write, resume))
    for (_, losses, state), (new_losses, new_state) in zip(told, resumed, strict=True):
        assert new_losses == losses
        assert all(torch.equal(new_state[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_holds_what_trains_and_is_read_whole(written, base: Path, name: str) -> None:
    run, (_, _, _) = written[(2, 2, 2, False)][name]
    lora, frozen = CASES[name]
    reader, whole = CheckpointReader(checkpoint_of(run)), CheckpointReader(base)
    assert set(reader.manifest.tensors) == set(trained_shapes(uneven.TINY, lora=lora, frozen=frozen))
    assert reader.manifest.base.path == "base" and reader.adapter == lora
    assert reader.names == whole.names == tuple(parameter_shapes(uneven.TINY))
    assert {key: reader.shape(key) for key in reader.names} == parameter_shapes(uneven.TINY)
    assert set(reader.adapter_names) == set(adapter_shapes(uneven.TINY, lora) if lora else ())
    reader.verify()
    changed = {key for key in reader.names if not torch.equal(reader.read(key), whole.read(key))}
    if lora is None:
        assert changed == set(trained_shapes(uneven.TINY, lora=None, frozen=frozen))
    else:
        assert changed == {
            key for key in reader.names if f"{key.removesuffix('.weight')}.lora_b.weight" in reader.adapter_names
        }
    for key in reader.names:  # by ranges as whole
        logical = replace(uneven.whole(key, uneven.TINY), dim=0, index=1, parts=2)
        part = reader.read_range(logical, "weight", 3, 5)
        assert torch.equal(part, logical.cut(reader.read(key)).reshape(-1)[3:8])


@pytest.mark.parametrize("name", ["lora", "dora", "frozen"])
def test_merged_weights_compute_what_the_run_does(written, name: str) -> None:
    reader = CheckpointReader(checkpoint_of(written[(2, 2, 2, False)][name][0]))
    decoder = load_decoder(reader, torch.float32, device=torch.device("cpu"))
    length = uneven.SEQUENCE
    tokens_T = (torch.arange(length) * 7919 + 13).remainder(uneven.TINY.vocab_size)  # the engine's fixed batch
    logits_TV = decoder.logits(tokens_T, torch.arange(length), torch.tensor([0, length], dtype=torch.int32))
    torch.testing.assert_close(logits_TV[-4:, : uneven.TINY.vocab_size], reader.probe, rtol=0, atol=1e-5)


def one_load(context: ParallelContext, run: str, given: bool) -> str:
    engine = uneven.make_engine(context, zero=1, precision="fp32", lora=CASES["dora"][0])
    store = make_store(Path(run), context, 1, base=Path(run) / "base" if given else None)
    try:
        store.load_newest(engine)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("given", [True, False])
def test_a_base_that_is_gone_or_another_is_told(written, tmp_path: Path, given: bool) -> None:
    run = Path(shutil.copytree(written[(1, 1, 2, False)]["dora"][0], tmp_path / "run"))
    assert run_ranks(one_load, 1, str(run), given) == [""], "a run's folder can be moved"
    (run / "base").rename(run / "aside")
    (gone,) = run_ranks(one_load, 1, str(run), given)
    assert f"lie in {run / 'base'}, where no checkpoint is now; put the one back" in gone
    with pytest.raises(CheckpointError, match="where no checkpoint is now"):
        CheckpointReader(checkpoint_of(run)).read("embedding.tokens.weight")
    run_ranks(write_base, 1, str(tmp_path / "other"), 1)
    shutil.copytree(checkpoint_of(tmp_path / "other"), run / "base")
    (another,) = run_ranks(one_load, 1, str(run), given)
    assert "is another checkpoint than the one that" in another and "put that one back in its place" in another
    shutil.rmtree(run / "base")
    (run / "aside").rename(run / "base")
    weights = next((run / "base").glob("rank-*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (damaged,) = run_ranks(one_load, 1, str(run), given)
    assert "its content is not what was written" in damaged and "put a whole copy in its place" in damaged
    assert len(published(run / "checkpoints")) == 1, "the run's own checkpoint is not to blame"


def test_a_checkpoint_is_read_by_way_of_a_link(written, tmp_path: Path) -> None:
    link = tmp_path / "best"
    link.symlink_to(checkpoint_of(written[(1, 1, 2, False)]["lora"][0]))
    CheckpointReader(link).verify()


def test_a_base_elsewhere_is_named_by_its_whole_path(base: Path, tmp_path: Path) -> None:
    run_ranks(write_beside, 1, str(tmp_path / "run"), str(base))
    manifest = read_manifest(checkpoint_of(tmp_path / "run"))
    assert manifest.base.path == str(base) and manifest.written_by == "pretrain"
    assert json.loads((checkpoint_of(tmp_path / "run") / "manifest.json").read_text())["version"] == 3
    assert CheckpointReader(checkpoint_of(tmp_path / "run")).read("final_norm.weight").numel()


def write_beside(context: ParallelContext, run: str, base: str) -> None:
    engine = uneven.make_engine(context, zero=1, precision="fp32", lora=LORA)
    store = make_store(Path(run), context, 1, base=Path(base))
    store.load_weights(engine, Path(base))
    store.save(engine, step=1, tokens=0, state={"updates": engine.updates})
    assert store.finish().problem is None


def test_other_tensors_are_an_error_unless_they_are_named(base: Path, tmp_path: Path) -> None:
    untied = replace(uneven.TINY, tied_head=False)
    assert run_ranks(load_into, 1, str(tmp_path), str(base), untied, (), ())[0].startswith(f"{base}: lacks head.weight")
    assert run_ranks(load_into, 1, str(tmp_path), str(base), untied, ("head.weight",), ()) == [""]
    shallow = replace(uneven.TINY, num_layers=1)
    (surplus,) = run_ranks(load_into, 1, str(tmp_path), str(base), shallow, (), ())
    assert "holds blocks.1.attention_norm.weight, which the model has not" in surplus and "and 3 more" in surplus
    left_out = tuple(name for name in parameter_shapes(uneven.TINY) if name.startswith("blocks.1."))
    assert run_ranks(load_into, 1, str(tmp_path), str(base), shallow, (), left_out) == [""]


def load_into(context: ParallelContext, run: str, base: str, model, new: tuple, left_out: tuple) -> str:
    engine = uneven.make_engine(context, zero=1, precision="fp32", model=model)
    store = make_store(Path(run), context, 1, base=None)
    try:
        store.load_weights(engine, Path(base), new=new, left_out=left_out)
    except CheckpointError as error:
        return str(error)
    return ""
