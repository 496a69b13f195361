"""Adapters trained over several ranks, as PEFT reads them: beside the base, merged by PEFT, and merged by us."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers

from conf.errors import UserError
from tests.dist import run_ranks
from tests.distributed import uneven
from tests.distributed.test_lora_checkpoints import checkpoint_of, make_store
from tests.parity.pairs import CASES
from tests.unit.convert.checkpoints import LLAMA, VOCAB_SIZE, write_checkpoint
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.reader import CheckpointReader
from train.config.adapter import LoraConfig
from train.config.model import ModelConfig
from train.convert.hf_export import plan_weights, write_model
from train.convert.peft_export import write_adapter
from train.inference.load import load_decoder
from train.model.transformer import Reading
from train.parallel import ParallelContext, split_ranks

pytestmark = pytest.mark.further

LORA = LoraConfig(rank=3, alpha=12)
LABELS = ("no", "maybe", "yes")
LENGTH = 60
# Layout: (ZeRO stage, tensor-parallel ranks, data-parallel ranks, rows split by sequence parallelism).
TOGETHER, ALONE = (2, 2, 2, True), (1, 1, 1, False)
OF_PAIRS = {name: replace(CASES[name], vocab_size=VOCAB_SIZE) for name in ("gpt2", "gpt-neox", "phi3", "qwen2", "gemma2")}
EXPORTS: dict[str, tuple[ModelConfig, LoraConfig, tuple]] = {
    "llama": (LLAMA, LORA, TOGETHER),
    "llama-rslora": (LLAMA, replace(LORA, rslora=True), TOGETHER),
    "llama-dora": (LLAMA, replace(LORA, dora=True), TOGETHER),
    "llama-few": (LLAMA, replace(LORA, targets=("blocks.1.attention.qkv", "blocks.*.mlp.down")), TOGETHER),
    "llama-labels": (replace(LLAMA, labels=LABELS), LORA, TOGETHER),
    "gpt2": (OF_PAIRS["gpt2"], LORA, ALONE),
    "gpt2-output": (OF_PAIRS["gpt2"], replace(LORA, targets=("blocks.*.attention.output",)), ALONE),
    "gpt2-dora-rslora": (OF_PAIRS["gpt2"], replace(LORA, dora=True, rslora=True), ALONE),
    "gpt-neox": (OF_PAIRS["gpt-neox"], LORA, ALONE),
    "phi3": (OF_PAIRS["phi3"], replace(LORA, dora=True), ALONE),
    "phi3-rslora": (OF_PAIRS["phi3"], replace(LORA, rslora=True), ALONE),
    "qwen2": (OF_PAIRS["qwen2"], replace(LORA, dora=True), ALONE),
    "gemma2": (OF_PAIRS["gemma2"], LORA, ALONE),
}


def train(context: ParallelContext, runs: list[str], bases: list[str], names: list[str], layout: tuple) -> None:
    """A few steps of every case, and a checkpoint."""
    zero, tensor, _, rows = layout
    context = split_ranks(context, tensor_parallel=tensor, sequence_parallel=rows)
    for run, base, name in zip(runs, bases, names, strict=True):
        model, lora, _ = EXPORTS[name]
        engine = uneven.make_engine(context, zero=zero, precision="fp32", model=model, lora=lora)
        store = make_store(Path(run), context, zero, base=Path(base), model=model)
        store.load_weights(
            engine,
            Path(base),
            new=("score.weight",) if model.labels else (),
            left_out=("head.weight",) if model.labels else (),
        )
        for step in range(4):
            engine.train_step(uneven.batches_of_step(step, context, len(model.labels)), lr=0.02, step=step)
        store.save(engine, step=4, tokens=0, state={"updates": engine.updates})
        assert store.finish().problem is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[CheckpointReader, CheckpointReader]]:
    """Of every case: the base, and the checkpoint that was trained on it."""
    places = {name: tmp_path_factory.mktemp(name) for name in EXPORTS}
    bases = {
        name: write_checkpoint(places[name] / "base", replace(model, labels=())) for name, (model, _, _) in EXPORTS.items()
    }
    for layout in (TOGETHER, ALONE):
        names = [name for name, (_, _, theirs) in EXPORTS.items() if theirs == layout]
        runs = [str(places[name] / "run") for name in names]
        run_ranks(train, layout[1] * layout[2], runs, [str(bases[name]) for name in names], names, layout)
    return {name: (CheckpointReader(bases[name]), CheckpointReader(checkpoint_of(places[name] / "run"))) for name in EXPORTS}


def exported(reader: CheckpointReader, folder: Path) -> Path:
    folder.mkdir()
    write_model(reader, plan_weights(reader, "fp32", shard_bytes=1 << 30), folder, dtype="fp32")
    return folder


@pytest.mark.parametrize("name", EXPORTS)
def test_peft_computes_with_the_adapters_what_we_compute_merged(trained, tmp_path: Path, name: str) -> None:
    base, reader = trained[name]
    model, lora, _ = EXPORTS[name]
    folder = exported(base, tmp_path / "base")
    auto, words = transformers.AutoModelForCausalLM, {}
    if model.labels:
        auto, words = transformers.AutoModelForSequenceClassification, {"num_labels": len(LABELS)}
    bare = auto.from_pretrained(folder, attn_implementation="eager", **words).eval()
    write_adapter(reader, tmp_path / "adapter", base_model=str(folder))

    tokens_T = torch.randint(280, (LENGTH,), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens_T.unsqueeze(0)}
    if model.labels:
        bare.config.pad_token_id = 300  # of no token here: the last one is read
    with torch.no_grad():
        before = bare(**inputs).logits[0]
        beside = peft.PeftModel.from_pretrained(bare, tmp_path / "adapter").eval()
        beside_TV = beside(**inputs).logits[0]
        merged_TV = beside.merge_and_unload()(**inputs).logits[0]
        reading = Reading(sequence_length=LENGTH, document_mask=False)
        decoder = load_decoder(reader, torch.float32, device=torch.device("cpu"), reading=reading)
        ours_TV = decoder.logits(tokens_T, torch.arange(LENGTH), torch.tensor([0, LENGTH], dtype=torch.int32))
        ours_TV = ours_TV[-1] if model.labels else ours_TV[:, : model.vocab_size]
    assert (before - ours_TV).abs().max() > 0.01, "the adapters do nothing"
    torch.testing.assert_close(ours_TV, beside_TV, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours_TV, merged_TV, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "llama-dora", "gpt2"])
def test_the_exported_model_is_the_merged_one(trained, tmp_path: Path, name: str) -> None:
    base, reader = trained[name]
    write_adapter(reader, tmp_path / "adapter", base_model="base")
    bare = transformers.AutoModelForCausalLM.from_pretrained(exported(base, tmp_path / "base"))
    merged = peft.PeftModel.from_pretrained(bare, tmp_path / "adapter").merge_and_unload().state_dict()
    ours = transformers.AutoModelForCausalLM.from_pretrained(exported(reader, tmp_path / "merged")).state_dict()
    assert ours.keys() == merged.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, merged[key], rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_settings_say_what_peft_needs(trained, tmp_path: Path) -> None:
    def settings(name: str) -> dict:
        write_adapter(trained[name][1], tmp_path / name, base_model="meta/some-llama")
        return json.loads((tmp_path / name / "adapter_config.json").read_text())

    llama = settings("llama")
    assert llama["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert llama["base_model_name_or_path"] == "meta/some-llama" and llama["task_type"] == "CAUSAL_LM"
    assert (llama["r"], llama["lora_alpha"], llama["rank_pattern"]) == (3, 12, {})
    few = settings("llama-few")["target_modules"]
    assert "model.layers.1.self_attn.q_proj" in few and len(few) == 3 + 2
    assert settings("llama-labels") | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} == settings("llama-labels")
    assert settings("gpt2")["rank_pattern"] == {f"transformer.h.{layer}.attn.c_attn": 9 for layer in range(2)}


def test_a_checkpoint_without_adapters_has_none_to_write(trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no adapters, its run trained the weights themselves; export the model"):
        write_adapter(trained["llama"][0], tmp_path, base_model="base")


def test_a_new_head_is_read_and_the_old_one_is_left(trained) -> None:
    base, reader = trained["llama-labels"]
    assert "head.weight" in base.names and "head.weight" not in reader.names
    assert reader.names == tuple(name for name in base.names if name != "head.weight") + ("score.weight",)
    with pytest.raises(CheckpointError, match=r"holds no head\.weight"):
        reader.read("head.weight")
    with pytest.raises(CheckpointError, match=r"holds no exp_avg of final_norm\.weight, which its run did not train"):
        reader.read("final_norm.weight", "exp_avg")
