"""Initial values against the published table: spread of each kind of tensor, and the same bits in every layout."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
import torch

from tests.dist import run_ranks
from tests.models import initial_decoder, initial_value
from tests.parity.pairs import CASES
from train.model.blueprint import Blueprint
from train.model.cost import parameter_shapes
from train.model.init import draw
from train.model.logical import LogicalTensor, logical_parameters
from train.model.transformer import Reading
from train.parallel import ParallelContext

LAYERS, STD = 8, 0.03
READING = Reading(sequence_length=8, document_mask=False)


def _model(case: str):
    return replace(CASES[case], num_layers=LAYERS, init_std=STD)


def _expected_std(name: str) -> float:
    """Written out from the papers, not from the table under test: the two writers of the residual stream are scaled."""
    return STD / sqrt(2 * LAYERS) if name.endswith(("attention.output.weight", "mlp.down.weight")) else STD


@pytest.mark.parametrize("case", CASES)
def test_spread_of_every_tensor(case):
    decoder = initial_decoder(Blueprint(model=_model(case)), READING, seed=1)
    for name, parameter in logical_parameters(decoder).items():
        values = parameter.detach().double()
        if name.endswith("bias"):
            assert (values == 0).all(), name
        elif "norm" in name:
            assert (values == (0 if case.startswith("gemma") else 1)).all(), name  # Gemma's is added to 1
        else:
            std, count = _expected_std(name), values.numel()
            # Sampling errors of mean and standard deviation of a normal; 5 of them is once in 2 million tensors.
            assert abs(values.mean().item()) < 5 * std / sqrt(count), name
            assert abs(values.std().item() - std) < 5 * std / sqrt(2 * count), name


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa"])
def test_seed_and_name_decide_alone(case):
    model = _model(case)
    build = lambda seed: logical_parameters(initial_decoder(Blueprint(model=model), READING, seed=seed))  # noqa: E731
    torch.manual_seed(0)
    first = build(5)
    torch.manual_seed(1)  # the global generator has no say
    second, other = build(5), build(6)
    matrices = [name for name, parameter in first.items() if parameter.dim() > 1 and not name.endswith("bias")]
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for name in matrices:
        assert not torch.equal(first[name], other[name]), name
    seen = {tuple(first[name].detach().flatten()[:4].tolist()) for name in matrices}
    assert len(seen) == len(matrices), "two tensors start from the same values"


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa", "gemma3"])
def test_two_slices_are_the_whole(case):
    model = replace(_model(case), family="custom", num_kv_heads=None, num_heads=4)
    for name, shape in parameter_shapes(model).items():
        whole = initial_value(model, LogicalTensor(name=name, shape=shape), 5)
        for dim, size in enumerate(shape):
            if size % 2:
                continue
            cuts = [LogicalTensor(name=name, shape=shape, dim=dim, index=index, parts=2) for index in (0, 1)]
            parts = [initial_value(model, cut, 5) for cut in cuts]
            assert [tuple(part.shape) for part in parts] == [cut.local_shape for cut in cuts]
            assert torch.equal(torch.cat(parts, dim=dim), whole), (name, dim)
            flat = parts[1].reshape(-1)
            for start, stop in ((0, 1), (3, 70), (len(flat) // 3, len(flat))):  # what ZeRO leaves of a slice
                some = torch.empty_like(flat[start:stop])
                draw(model, cuts[1], 5, some, start=start)
                assert torch.equal(some, flat[start:stop]), (name, dim, start)


def peak_of_a_slice(context: ParallelContext) -> tuple[int, int]:
    """(bytes of a slice, most bytes beyond the start while it is drawn) of an output matrix of 1 GiB."""
    model = replace(_model("llama-gqa"), hidden_size=16384, num_heads=4, num_kv_heads=4, tied_head=False)
    matrix = LogicalTensor(name="blocks.0.attention.output.weight", shape=(16384, 16384), dim=1, index=3, parts=8)
    piece = torch.empty(matrix.local_numel // 8)
    draw(model, matrix, 5, piece[:1000])
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    draw(model, matrix, 5, piece, start=2 * piece.numel() + 7)
    assert abs(piece.std().item() / (STD / sqrt(2 * LAYERS)) - 1) < 0.01
    return piece.nbytes, _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def test_a_slice_of_a_large_matrix_takes_little_more_than_itself():
    [(size, peak)] = run_ranks(peak_of_a_slice, 1)
    assert size == 1 << 24
    assert peak < size + (8 << 20), f"{peak / size:.2f} times the slice"
