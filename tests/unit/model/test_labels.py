"""Models with labels: the rules of the setting, what they cost, and what they take over from a language model."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

from conf.errors import ConfigError
from tests.models import initial_decoder, initial_value
from tests.parity.pairs import CASES
from train.config.model import ModelConfig
from train.inference.load import assemble_decoder
from train.model.blueprint import Blueprint
from train.model.cost import body_shapes, num_parameters, parameter_shapes, parameters_per_rank
from train.model.flops import flops_per_token
from train.model.logical import LogicalTensor, logical_parameters
from train.model.transformer import Reading

LABELS = ("no", "maybe", "yes")
READING = Reading(sequence_length=16, document_mask=True)


def with_labels(case: str) -> ModelConfig:
    return replace(CASES[case], labels=LABELS)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("yes",), r"labels=\['yes'\]: a head tells at least 2 apart"),
        (("yes", "no", "yes"), "labels: hold yes more than once"),
        (("yes", ""), "labels: hold an empty name"),
    ],
)
def test_labels_that_no_head_can_have(labels, words):
    with pytest.raises(ConfigError, match=words):
        replace(CASES["llama-gqa"], labels=labels)


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa", "gemma2"])
def test_the_decoder_has_the_parameters_of_the_table_and_no_output_matrix(case):
    model = with_labels(case)
    named = logical_parameters(initial_decoder(Blueprint(model=model), READING, seed=1))
    assert {name: parameter.logical.shape for name, parameter in named.items()} == parameter_shapes(model)
    assert list(named)[-1] == "score.weight" and "head.weight" not in named
    assert sum(parameter.numel() for parameter in named.values()) == num_parameters(model)
    score = named["score.weight"].detach()
    assert score.shape == (3, model.hidden_size) and score.std() == pytest.approx(model.init_std, rel=0.2)


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa"])
def test_cost_follows_the_head(case):
    model, language_model = with_labels(case), CASES[case]
    rows = language_model.padded_vocab_size - len(LABELS)
    assert flops_per_token(language_model, 8)[0] - flops_per_token(model, 8)[0] == 6 * rows * model.hidden_size
    whole = prod(parameter_shapes(model)["score.weight"])
    without = sum(prod(shape) for shape in body_shapes(model).values())
    assert num_parameters(model) == without + whole
    assert parameters_per_rank(model, 3) - whole == parameters_per_rank(replace(language_model, tied_head=True), 3)


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa"])
def test_the_body_is_that_of_the_language_model_and_the_head_is_fresh(case):
    """A checkpoint of a language model begins a model with labels: all its tensors but the output matrix."""
    language_model, model = CASES[case], with_labels(case)
    given = logical_parameters(initial_decoder(Blueprint(model=language_model), READING, seed=1))
    assert body_shapes(model) == body_shapes(language_model)
    assert parameter_shapes(model).keys() - parameter_shapes(language_model).keys() == {"score.weight"}
    assert parameter_shapes(language_model).keys() - parameter_shapes(model).keys() <= {"head.weight"}
    fresh = initial_value(model, LogicalTensor(name="score.weight", shape=parameter_shapes(model)["score.weight"]), 5)

    def read(name: str) -> torch.Tensor:
        return given[name].detach() if name in body_shapes(model) else fresh

    taken = logical_parameters(assemble_decoder(Blueprint(model=model), read, reading=READING))
    assert all(torch.equal(taken[name], given[name]) for name in body_shapes(model))
    of_seed = logical_parameters(initial_decoder(Blueprint(model=model), READING, seed=5))
    assert torch.equal(taken["score.weight"], of_seed["score.weight"])
    assert not torch.equal(of_seed["score.weight"], logical_parameters(
        initial_decoder(Blueprint(model=model), READING, seed=6)
    )["score.weight"])  # fmt: skip
