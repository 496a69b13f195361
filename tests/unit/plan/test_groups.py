"""Which parameter gets which learning rate and decay; and that muP's rates and values keep a network's motion the same size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.muon import original_muon

from conf.errors import ConfigError
from data_pipeline.rows_config import RowsConfig
from data_pipeline.task_config import TaskConfig, TaskSource
from tests.distributed import uneven
from tests.models import initial_decoder
from tests.unit.plan.test_plan import settings
from train.config.adapter import LoraConfig
from train.config.finetune import FinetuneConfig
from train.config.method import MethodConfig
from train.config.training import BatchConfig, BudgetConfig, EvaluateConfig, GroupRule, OptimConfig
from train.engine.optimizers import make_optimizer, update_stance
from train.model.blueprint import Blueprint
from train.model.logical import logical_of
from train.model.transformer import Reading
from train.optim import OptimizerSpec, parameter_groups
from train.plan import make_plan

READING = Reading(sequence_length=uneven.SEQUENCE, document_mask=True)


def rates(model, optim: OptimConfig) -> dict[str, tuple[float, float]]:
    """Name -> (learning-rate scale, decay)."""
    decoder = initial_decoder(Blueprint(model=model), READING, seed=1)
    return {
        logical_of(parameter).name: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(decoder, OptimizerSpec(settings=optim, width_ratio=model.width_ratio))
        for parameter in group["params"]
    }


def test_the_first_rule_that_fits_counts() -> None:
    rules = (
        GroupRule(pattern="embedding.*", lr_scale=0.5, weight_decay=0.0),
        GroupRule(pattern="*.attention.*", lr_scale=2.0),
        GroupRule(pattern="blocks.1.*", lr_scale=3.0, weight_decay=0.7),
    )
    found = rates(uneven.TINY_GPT2, OptimConfig(weight_decay=0.1, rules=rules))
    assert found["embedding.tokens.weight"] == (0.5, 0.0)
    assert found["blocks.1.attention.qkv.weight"] == (2.0, 0.1)
    assert found["blocks.1.attention.qkv.bias"] == (2.0, 0.0)
    assert found["blocks.1.mlp_norm.weight"] == (3.0, 0.7)
    assert found["blocks.0.mlp.down.weight"] == (1.0, 0.1)
    assert found["final_norm.weight"] == (1.0, 0.0)


def test_a_rule_that_fits_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"optim.rules\[0\].pattern=embeddings.*fits no parameter"):
        make_plan(settings("optim.rules=[{pattern: 'embeddings.*'}]"), 1)


def test_a_rule_is_of_what_trains() -> None:
    adapted = FinetuneConfig(
        initial_checkpoint="somewhere",
        model=uneven.TINY,
        task=TaskConfig(kind="dialogue", name="lesson", data=(TaskSource(path="rows.jsonl"),)),
        data=RowsConfig(sequence_length=uneven.SEQUENCE),
        evaluate=EvaluateConfig(probes=()),
        batch=BatchConfig(sequences=4, micro_batch=2),
        budget=BudgetConfig(steps=10),
        method=MethodConfig(lora=LoraConfig()),
        optim=OptimConfig(rules=(GroupRule(pattern="*.lora_b.weight", lr_scale=16.0),)),
    )
    make_plan(adapted, 1)
    frozen = OptimConfig(rules=(GroupRule(pattern="embedding.*", lr_scale=2.0),))
    with pytest.raises(ConfigError, match=r"pattern=embedding.*fits no parameter that is trained; they are called .*lora_a"):
        make_plan(replace(adapted, optim=frozen), 1)


def test_mup_scales_the_growing_matrices_alone() -> None:
    model = replace(uneven.TINY, mup_base_width=8)  # four times as wide
    found = rates(model, OptimConfig(rules=(GroupRule(pattern="blocks.0.mlp.down.*", lr_scale=2.0),)))
    assert {name for name, (scale, _) in found.items() if scale != 1.0} == {
        name for name in found if name.endswith(("qkv.weight", "output.weight", "gate_up.weight", "down.weight"))
    }
    assert found["blocks.1.mlp.down.weight"][0] == 0.25 and found["blocks.0.mlp.down.weight"][0] == 0.5


def test_mup_at_its_base_changes_nothing() -> None:
    plain, based = (
        initial_decoder(Blueprint(model=replace(uneven.TINY, mup_base_width=width)), READING, seed=1)
        for width in (None, uneven.TINY.hidden_size)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), based.parameters(), strict=True))
    batch = uneven.micro_batch([1, 2])
    inputs = (batch.tokens, batch.labels, batch.positions, batch.document_bounds)
    assert torch.equal(plain(*inputs)[0], based(*inputs)[0])


def motion(width: int, *, mup: bool, kind: str = "adamw") -> float:
    """How far four updates move the logits of a model, root mean square: the coordinate check of Tensor Programs V."""
    model = replace(
        uneven.TINY, hidden_size=width, num_heads=width // 8, num_kv_heads=width // 8, ffn_size=2 * width, tied_head=False,
        mup_base_width=64 if mup else None,
    )  # fmt: skip
    decoder = initial_decoder(Blueprint(model=model), READING, seed=1)
    settings = OptimConfig(kind=kind, lr=3e-3, weight_decay=0.0, newton_schulz="standard")
    spec = OptimizerSpec(settings=settings, width_ratio=model.width_ratio)
    optimizer = make_optimizer(decoder, spec)
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * group["lr_scale"]
    batch = uneven.micro_batch([1, 2, 3, 4])
    inputs = (batch.tokens, batch.labels, batch.positions, batch.document_bounds)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return decoder.logits(batch.tokens, batch.positions, batch.document_bounds)[:, : model.vocab_size]

    before = logits()
    for _ in range(4):
        optimizer.zero_grad()
        objective, _, targets = decoder(*inputs)
        (objective / targets).backward()
        with update_stance(spec):
            optimizer.step()
    return (logits() - before).square().mean().sqrt().item()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_mup_keeps_the_motion_of_the_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 64 to 256 wide the logits move alike with muP, and further and further without."""
    # Newton-Schulz chooses bf16, which a CPU without it computes two hundred times slower than fp32.
    monkeypatch.setattr(original_muon, "ns_compute_dtype", lambda method: torch.float32)
    with_mup, without = ([motion(width, mup=mup, kind=kind) for width in (64, 256)] for mup in (True, False))
    assert 0.5 < with_mup[1] / with_mup[0] < 2.0, with_mup
    assert without[1] / without[0] > (3.0 if kind == "adamw" else 2.0), without


def test_muon_takes_the_matrices_of_the_blocks_at_its_own_rate() -> None:
    optim = OptimConfig(kind="muon", lr=1e-3, muon_lr=0.02, rules=(GroupRule(pattern="*.down.*", lr_scale=0.5),))
    decoder = initial_decoder(Blueprint(model=uneven.TINY), READING, seed=1)
    muon = {
        logical_of(parameter).name: group["lr_scale"]
        for group in parameter_groups(decoder, OptimizerSpec(settings=optim, width_ratio=4.0))
        for parameter in group["params"]
        if group["use_muon"]
    }
    assert muon == {
        f"blocks.{number}.{name}.weight": pytest.approx(10.0 if name == "mlp.down" else 20.0)
        for number in (0, 1)
        for name in ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
    }
