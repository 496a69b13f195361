"""Settings that no family of ours has yet: logits and every gradient against classes of Hugging Face that compute the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.models import initial_decoder
from tests.parity.custom import CUSTOM, LIMIT, LONGROPE, make_custom_pair
from tests.parity.pairs import CASES, VOCAB_SIZE, gradients_of, whole_sequence_inputs
from train.config.kernels import KernelsConfig
from train.model.blueprint import Blueprint
from train.model.cost import num_parameters, parameter_shapes
from train.model.layers import ACTIVATIONS, NormAcrossHeads
from train.model.logical import logical_parameters
from train.model.transformer import Reading

TOLERANCE = 1e-5
SEQUENCES = 2


@pytest.mark.parametrize("length", [40, 150])  # within and beyond what the stretched ones were trained at
@pytest.mark.parametrize("case", CUSTOM)
def test_logits_and_gradients(case: str, length: int) -> None:
    pair = make_custom_pair(case)
    tokens_T, labels_T, positions_T, bounds = whole_sequence_inputs(SEQUENCES, length)
    ours = pair.ours(length)
    theirs_TV = pair.theirs(input_ids=tokens_T.view(SEQUENCES, length)).logits.flatten(0, 1)
    torch.testing.assert_close(ours.logits(tokens_T, positions_T, bounds)[:, :VOCAB_SIZE], theirs_TV, atol=TOLERANCE, rtol=0)
    objective, _, targets = ours(tokens_T, labels_T, positions_T, bounds)
    F.cross_entropy(theirs_TV, labels_T).backward()
    (objective / targets).backward()
    theirs, found = pair.their_gradients(), gradients_of(ours)
    assert theirs.keys() == found.keys()
    for name, gradient in found.items():
        allowed = min(TOLERANCE, 1e-4 * gradient.abs().max().item())
        assert allowed > 0, name
        torch.testing.assert_close(gradient, theirs[name], atol=allowed, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", ["longrope", "yarn", "yarn-qwen2"])
def test_a_scaling_makes_a_difference(case: str) -> None:
    pair = make_custom_pair(case)
    plain = replace(pair, model=replace(pair.model, rope=CASES["llama-gqa"].rope))
    tokens_T, _, positions_T, bounds = whole_sequence_inputs(1, 150)
    with torch.no_grad():
        found, without = (each.ours(150).logits(tokens_T, positions_T, bounds)[:, :VOCAB_SIZE] for each in (pair, plain))
    assert (found - without).abs().max() > 1e-2


# Two sequences of 150: one of exactly the limit and one far beyond it; one of a token more than the limit; short ones.
DOCUMENTS = (LIMIT, 1, 85, LIMIT + 1, 5, 20, 60)
LENGTH = 150


def test_longrope_of_packed_documents_is_that_of_the_documents_alone() -> None:
    pair = make_custom_pair("longrope")
    starts = torch.tensor([0, *DOCUMENTS]).cumsum(0).tolist()
    tokens_T = torch.randint(VOCAB_SIZE, (starts[-1],), generator=torch.Generator().manual_seed(1))
    positions_T = torch.cat([torch.arange(size) for size in DOCUMENTS])
    bounds = torch.tensor([*starts, *[starts[-1]] * 5], dtype=torch.int32)  # padded with T
    packed = pair.ours(LENGTH, document_mask=True)
    with torch.no_grad():
        packed_TV = packed.logits(tokens_T, positions_T, bounds)[:, :VOCAB_SIZE]
        for start, end in zip(starts, starts[1:], strict=False):
            alone_TV = pair.theirs(input_ids=tokens_T[None, start:end]).logits[0]
            torch.testing.assert_close(packed_TV[start:end], alone_TV, atol=TOLERANCE, rtol=0)


def test_longrope_of_sequences_that_are_read_whole_goes_by_their_length() -> None:
    """The bounds say nothing where documents are not kept apart, as in attention."""
    pair = make_custom_pair("longrope")
    tokens_T, _, positions_T, bounds = whole_sequence_inputs(SEQUENCES, 100)
    padded = torch.tensor([0, 30, 100, 200, 200], dtype=torch.int32)
    decoder = pair.ours(100)
    with torch.no_grad():
        expected, found = (decoder.logits(tokens_T, positions_T, each) for each in (bounds, padded))
    assert torch.equal(expected, found)


def test_the_norm_across_heads_in_float64() -> None:
    model = replace(CUSTOM["olmo2"][0], norm_one_plus=True, norm_epsilon=1e-2)
    norm = NormAcrossHeads("blocks.0.attention.query_norm", model.num_heads, Blueprint(model=model))
    generator = torch.Generator().manual_seed(3)
    states_TND = torch.randn(11, model.num_heads, model.head_dim, generator=generator)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        found = norm(states_TND)
        exact = states_TND.double().flatten(1)
        exact = exact / (exact.square().mean(dim=1, keepdim=True) + 1e-2).sqrt() * (1 + norm.weight.double())
        torch.testing.assert_close(found.double(), exact.view(found.shape), atol=1e-6, rtol=1e-6)
        halved = norm(states_TND.bfloat16())
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.double(), found.double(), atol=0.05, rtol=0.02)


def test_the_exact_gate_is_not_the_approximate_one() -> None:
    gate = torch.linspace(-4, 4, 101, dtype=torch.float64)
    exact = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    torch.testing.assert_close(ACTIVATIONS["geglu_exact"](gate), exact)
    assert (ACTIVATIONS["geglu"](gate) - exact).abs().max() > 1e-4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qkv_bias", [None, False, True])
@pytest.mark.parametrize("output_bias", [None, False, True])
def test_every_combination_of_biases(bias: bool, qkv_bias: bool | None, output_bias: bool | None) -> None:
    model = replace(CUSTOM["olmo2"][0], bias=bias, qkv_bias=qkv_bias, attention_output_bias=output_bias, num_layers=1)
    decoder = initial_decoder(Blueprint(model=model), Reading(sequence_length=8, document_mask=False), seed=1)
    built = {name: tuple(parameter.logical.shape) for name, parameter in logical_parameters(decoder).items()}
    assert list(built.items()) == list(parameter_shapes(model).items())
    assert num_parameters(model) == sum(parameter.numel() for parameter in decoder.parameters())
    biases = {name.removeprefix("blocks.0.") for name in built if name.endswith("bias")}
    expected = {"mlp.gate_up.bias", "mlp.down.bias"} if bias else set()
    expected |= {"attention.qkv.bias"} if (bias if qkv_bias is None else qkv_bias) else set()
    expected |= {"attention.output.bias"} if (bias if output_bias is None else output_bias) else set()
    assert biases == expected


def test_selective_recomputation_of_all_of_it() -> None:
    """The gradients of a block that is run again are those of one that is not."""
    rope = replace(LONGROPE, short_factors=(1.0,) * 6, long_factors=(2.0,) * 6)
    settings = replace(CUSTOM["olmo2"][0], rope=rope)
    inputs = whole_sequence_inputs(SEQUENCES, 80)
    found = []
    for recompute in ("none", "selective", "full"):
        blueprint = Blueprint(model=settings, kernels=KernelsConfig(recompute=recompute))
        decoder = initial_decoder(blueprint, Reading(sequence_length=80, document_mask=True), seed=1)
        decoder(*inputs)[0].backward()
        found.append(gradients_of(decoder))
    for again in found[1:]:
        for name, gradient in found[0].items():
            assert torch.equal(gradient, again[name]), name
