"""Adapters by themselves: their rules, their names and shapes, their initial values, what they leave out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conf.errors import ConfigError, UserError
from tests.distributed import uneven
from tests.models import initial_decoder, initial_value
from train.config.adapter import LoraConfig
from train.config.kernels import KernelsConfig
from train.model.adapters import adapter_shapes, trained_shapes
from train.model.blueprint import Blueprint
from train.model.heads import LossHead
from train.model.logical import LogicalTensor, logical_parameters
from train.model.lora import merged, row_lengths, settings_of
from train.model.transformer import Decoder, Reading
from train.optim import OptimizerSpec, parameter_groups

READING = Reading(sequence_length=8, document_mask=False)
DORA = LoraConfig(rank=3, alpha=12, dora=True)


def decoder(lora: LoraConfig | None, model=uneven.TINY, **more) -> Decoder:
    return initial_decoder(Blueprint(model=model, lora=lora, **more), READING, seed=7)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 0}, "rank=0: must be at least 1"),
        ({"alpha": 0.0}, "alpha=0.0: must be positive"),
        ({"dropout": 1.0}, "dropout=1.0: must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout=-0.1: must be at least 0 and below 1"),
        ({"targets": ()}, "targets=[]: leaves nothing to train"),
    ],
)
def test_rules(values: dict, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        LoraConfig(**values)
    assert words in str(error.value)


def test_scaling() -> None:
    assert LoraConfig(rank=16, alpha=8).scaling == 0.5
    assert LoraConfig(rank=16, alpha=8, rslora=True).scaling == 2


def test_shapes_are_of_each_projection() -> None:
    shapes = adapter_shapes(uneven.TINY, DORA)
    block = {name.removeprefix("blocks.0."): shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
    assert block == {
        "attention.qkv.lora_a.weight": (3, 3, 32),
        "attention.qkv.lora_b.weight": (2, 4, 8, 3),
        "attention.qkv.lora_magnitude.weight": (2, 4, 8),
        "attention.output.lora_a.weight": (3, 32),
        "attention.output.lora_b.weight": (32, 3),
        "attention.output.lora_magnitude.weight": (32,),
        "mlp.gate_up.lora_a.weight": (2, 3, 32),
        "mlp.gate_up.lora_b.weight": (2, 48, 3),
        "mlp.gate_up.lora_magnitude.weight": (2, 48),
        "mlp.down.lora_a.weight": (3, 48),
        "mlp.down.lora_b.weight": (32, 3),
        "mlp.down.lora_magnitude.weight": (32,),
    }
    named = logical_parameters(decoder(DORA))
    assert {name: value.logical.shape for name, value in named.items() if value.requires_grad} == shapes
    assert settings_of(decoder(DORA)) == DORA and settings_of(decoder(None)) is None


def test_a_new_head_trains_beside_the_adapters() -> None:
    model = replace(uneven.TINY, labels=("a", "b"))
    assert set(trained_shapes(model, lora=DORA, frozen=())) == {*adapter_shapes(model, DORA), "score.weight"}
    assert logical_parameters(decoder(DORA, model))["score.weight"].requires_grad


def test_initial_values_are_those_of_the_model_without_adapters() -> None:
    """B is zero and the lengths are the rows' own: at the start an adapter changes nothing; A is uniform below 1 / sqrt(in)."""
    plain, adapted = logical_parameters(decoder(None)), logical_parameters(decoder(DORA))
    assert all(torch.equal(value, adapted[name]) for name, value in plain.items())
    first = adapted["blocks.1.mlp.down.lora_a.weight"]
    assert 0.9 * 48**-0.5 < first.abs().max() <= 48**-0.5 and not first.equal(adapted["blocks.0.mlp.down.lora_a.weight"])
    for name, shape in adapter_shapes(uneven.TINY, DORA).items():
        if name.endswith("lora_b.weight"):
            assert not adapted[name].any()
        if name.endswith("lora_magnitude.weight"):
            weight = plain[name.replace(".lora_magnitude", "")]
            torch.testing.assert_close(adapted[name].detach(), weight.detach().view(*shape, -1).norm(dim=-1))
    tokens_T = torch.arange(8)
    inputs = (tokens_T, torch.arange(8), torch.tensor([0, 8], dtype=torch.int32))
    with torch.no_grad():
        torch.testing.assert_close(decoder(DORA).logits(*inputs), decoder(None).logits(*inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["blocks.0.attention.qkv.lora_b.weight", "blocks.0.mlp.gate_up.lora_magnitude.weight"])
def test_a_slice_is_of_the_same_initial_value(name: str) -> None:
    whole = LogicalTensor(name=name, shape=adapter_shapes(uneven.TINY, DORA)[name])
    part = replace(whole, dim=1 if "gate_up" in name else 0, index=1, parts=2)
    assert torch.equal(initial_value(uneven.TINY, part, 7), part.cut(initial_value(uneven.TINY, whole, 7)))


def test_merging_keeps_the_lengths_of_dora() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, first, second = (torch.randn(*shape, generator=generator) for shape in ((2, 48, 32), (2, 3, 32), (2, 48, 3)))
    lengths = torch.rand(2, 48, generator=generator) + 0.5
    adapter = dict(zip(adapter_names("blocks.0.mlp.gate_up"), (first, second, lengths), strict=True))
    whole = merged("blocks.0.mlp.gate_up", weight, adapter, DORA)
    torch.testing.assert_close(row_lengths(whole), lengths)
    turned = weight + 4 * torch.einsum("pfr,prh->pfh", second, first)
    torch.testing.assert_close(whole, turned * (lengths / turned.norm(dim=-1)).unsqueeze(-1))


def adapter_names(layer: str) -> list[str]:
    return [f"{layer}.{part}.weight" for part in ("lora_a", "lora_b", "lora_magnitude")]


def test_groups_hold_what_trains_and_lengths_do_not_decay() -> None:
    module = decoder(DORA)
    groups = parameter_groups(module, OptimizerSpec(settings=uneven.ADAMW))
    decay = {value.logical.name: group["weight_decay"] for group in groups for value in group["params"]}
    assert set(decay) == set(adapter_shapes(uneven.TINY, DORA))
    assert {name for name, rate in decay.items() if not rate} == {name for name in decay if "magnitude" in name}
    with pytest.raises(UserError, match="nothing trains: all tensors of the model are frozen"):
        parameter_groups(decoder(None).requires_grad_(False), OptimizerSpec(settings=uneven.ADAMW))


def test_a_frozen_head_has_no_gradient_in_chunks() -> None:
    kernels = KernelsConfig(logits_bytes=64 * 4 * 3)
    model = replace(uneven.TINY, tied_head=False)
    hidden_TH = torch.randn(11, model.hidden_size)
    labels_T = torch.randint(0, model.vocab_size, (11,))
    found = []
    for trains in (True, False):
        head = LossHead(Blueprint(model=model, kernels=kernels))
        with torch.no_grad():
            head.output.weight.copy_(initial_value(model, head.output.weight.logical, 3))
        head.output.weight.requires_grad_(trains)
        inputs = hidden_TH.clone().requires_grad_()
        head((inputs, labels_T, None, None))[0].backward()
        assert (head.output.weight.grad is not None) == trains
        found.append(inputs.grad)
    assert torch.equal(*found)
