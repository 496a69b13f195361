"""Adapters against PEFT on a Hugging Face model: logits, gradients, a training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.parity.adapters import gradients, make_adapters, with_biases
from tests.parity.pairs import CASES, VOCAB_SIZE, whole_sequence_inputs
from train.config.adapter import LoraConfig

LLAMA = CASES["llama-gqa"]
SEQUENCES, LENGTH, STEPS = 2, 40, 20
VARIANTS = {
    "lora": LoraConfig(rank=4, alpha=8),
    "rslora": LoraConfig(rank=5, alpha=8, rslora=True),
    "dora": LoraConfig(rank=4, alpha=8, dora=True),
}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_pefts(variant: str, biases: bool) -> None:
    adapters = make_adapters(with_biases(LLAMA) if biases else LLAMA, VARIANTS[variant])
    ours = adapters.ours(LENGTH)
    tokens_T, labels_T, positions_T, bounds = whole_sequence_inputs(SEQUENCES, LENGTH)
    theirs_TV = adapters.theirs(input_ids=tokens_T.view(SEQUENCES, LENGTH)).logits.flatten(0, 1)
    ours_TV = ours.logits(tokens_T, positions_T, bounds)[:, :VOCAB_SIZE]
    torch.testing.assert_close(ours_TV, theirs_TV, atol=1e-5, rtol=0)
    F.cross_entropy(theirs_TV, labels_T).backward()
    objective, _, targets = ours(tokens_T, labels_T, positions_T, bounds)
    (objective / targets).backward()
    expected, found = adapters.their_adapters("grad"), gradients(ours)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        largest = expected[name].abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(gradient, expected[name], atol=1e-4 * largest, rtol=0, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_has_pefts_losses(variant: str) -> None:
    """20 steps of AdamW on other tokens each."""
    adapters = make_adapters(LLAMA, VARIANTS[variant])
    ours, theirs = adapters.ours(LENGTH), adapters.theirs.train()
    optimizers = [
        torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.1)
        for module in (ours, theirs)
    ]
    frozen = [p.detach().clone() for p in ours.parameters() if not p.requires_grad]
    curves: list[list[float]] = [[], []]
    for step in range(STEPS):
        tokens_T, labels_T, positions_T, bounds = whole_sequence_inputs(SEQUENCES, LENGTH, seed=step % 4)
        objective, _, targets = ours(tokens_T, labels_T, positions_T, bounds)
        logits_TV = theirs(input_ids=tokens_T.view(SEQUENCES, LENGTH)).logits.flatten(0, 1)
        for curve, loss in zip(curves, (objective / targets, F.cross_entropy(logits_TV, labels_T)), strict=True):
            loss.backward()
            curve.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), atol=1e-4, rtol=0)
    assert curves[0][-1] < curves[0][0] - 0.3, "nothing was learned"
    for before, after in zip(frozen, (p for p in ours.parameters() if not p.requires_grad), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_blocks_have_the_same_gradients(variant: str, recompute: str) -> None:
    lora = VARIANTS[variant]
    adapters = make_adapters(LLAMA, LoraConfig(rank=lora.rank, dora=lora.dora, dropout=0.2))
    inputs = whole_sequence_inputs(SEQUENCES, LENGTH)
    found = []
    for kept in ("none", recompute):
        ours = adapters.ours(LENGTH, recompute=kept)
        torch.manual_seed(3)
        ours(*inputs)[0].backward()
        found.append(gradients(ours))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_dropout_is_of_the_adapters_input(variant: str) -> None:
    """A layer alone, with the same draws; PEFT's DoRA drops the frozen product's input too."""
    import peft
    from torch import nn

    from train.model.blueprint import Blueprint
    from train.model.tensor_parallel import expand_linear

    lora = LoraConfig(rank=4, alpha=8, dropout=0.3, dora=variant == "dora", targets=("up",))
    theirs = nn.Sequential(nn.Linear(LLAMA.hidden_size, 56))
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, use_dora=lora.dora, target_modules=["0"])
    ).train()
    layer = theirs.base_model.model[0]
    ours = expand_linear("up", (56,), Blueprint(model=LLAMA, lora=lora), bias=True)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        ours.weight.copy_(layer.base_layer.weight)
        ours.bias.copy_(layer.base_layer.bias)
        ours.lora_a.copy_(layer.lora_A["default"].weight)
        ours.lora_b.copy_(layer.lora_B["default"].weight)
        if lora.dora:
            ours.lora_magnitude.copy_(layer.lora_magnitude_vector["default"].weight)
    inputs_TI = torch.randn(30, LLAMA.hidden_size)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        results.append(module(inputs_TI))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=0)
    assert not torch.equal(ours(inputs_TI), results[0])
    assert torch.equal(ours.eval()(inputs_TI), ours(inputs_TI))
