"""FLOPs per token by hand, and as torch's own counter finds them in the model that runs."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed import uneven
from tests.models import initial_decoder
from tests.unit.config.words import pretrain_config
from train.config.adapter import LoraConfig
from train.config.kernels import KernelsConfig
from train.config.model import ModelConfig
from train.config.preference import PreferenceConfig
from train.model.blueprint import Blueprint
from train.model.cost import is_block_matrix, parameter_shapes
from train.model.flops import flops_per_token
from train.model.transformer import Reading
from train.plan import make_plan

TOKENS, LENGTH = 32, 16
FOUR = replace(uneven.TINY, num_layers=4, tied_head=False)


def model(name: str) -> ModelConfig:
    settings = pretrain_config(f"model={name}").model
    return settings if settings.vocab_size is not None else replace(settings, vocab_size=2000)


def test_flops_by_hand() -> None:
    """GPT-2 small, 1,024 tokens: 12 x 12 h^2 per layer and the head, 6 FLOPs each; attention 12 L h S (PaLM, appendix B)."""
    gpt2 = model("gpt2_124m")
    in_blocks = 12 * (3 * 768 * 768 + 768 * 768 + 2 * 768 * 3072)
    assert in_blocks == 12 * 12 * 768**2
    matmul = 6 * (in_blocks + 50304 * 768)
    full, causal = flops_per_token(gpt2, 1024)
    assert full == matmul + 12 * 12 * 768 * 1024
    assert causal == matmul + 6 * 12 * 768 * 1024


def test_flops_count_only_the_keys_of_a_window() -> None:
    plain = model("llama_mini")
    windowed = replace(plain, family="custom", window=64, window_pattern="SSL")  # on 4 of the 6 layers
    width = plain.num_heads * plain.head_dim
    matmul = flops_per_token(plain, 1024)[0] - 12 * width * 6 * 1024
    full, causal = flops_per_token(windowed, 1024)
    assert full == matmul + 12 * width * (4 * 64 + 2 * 1024)
    seen = [sum(min(position + 1, window) for position in range(1024)) / 1024 for window in (64, 1024)]
    assert causal - matmul == pytest.approx(12 * width * (4 * seen[0] + 2 * seen[1]), rel=2e-3)
    assert flops_per_token(windowed, 64) == flops_per_token(plain, 64)


def test_flops_count_the_head_once_whether_tied_or_not_and_no_lookup() -> None:
    tied = model("llama_mini")
    untied = replace(tied, tied_head=False)
    assert flops_per_token(tied, 64) == flops_per_token(untied, 64)
    learned = replace(model("gpt2_tiny"), max_positions=512)
    assert flops_per_token(learned, 64) == flops_per_token(replace(learned, max_positions=4096), 64)


def counted(settings: ModelConfig, *, logits_bytes: int = 1 << 30, **blueprint) -> float:
    """What torch counts in a forward and a backward pass, for each token."""
    kernels = KernelsConfig(attention="eager", logits_bytes=logits_bytes)
    reading = Reading(sequence_length=LENGTH, document_mask=False)
    decoder = initial_decoder(Blueprint(model=settings, kernels=kernels, **blueprint), reading, seed=0).train()
    tokens_T = torch.arange(TOKENS) % settings.vocab_size
    positions_T, bounds = torch.arange(TOKENS) % LENGTH, torch.tensor([0, LENGTH, TOKENS], dtype=torch.int32)
    labels_T = tokens_T % (len(settings.labels) or settings.vocab_size)
    with FlopCounterMode(display=False) as counter:
        decoder(tokens_T, labels_T, positions_T, bounds)[0].backward()
    return counter.get_total_flops() / TOKENS


MODELS = {
    "llama": FOUR,
    "tied": replace(FOUR, tied_head=True),
    "gpt2": uneven.TINY_GPT2,
    "gemma": replace(uneven.TINY_GEMMA, window=None, window_pattern="S", local_rope=None),
    "olmo2": uneven.TINY_OLMO2,
    "parallel-shared": uneven.TINY_PARALLEL,
    "parallel": replace(uneven.TINY_PARALLEL, residual="parallel"),
    "labels": replace(FOUR, labels=("no", "maybe", "yes")),
}
QUERIES = LoraConfig(rank=3, targets=("blocks.*.attention.qkv",))
WAYS = {
    "all": {},
    "lora": {"lora": LoraConfig(rank=3)},
    "lora of queries, keys and values": {"lora": QUERIES},
    "lora of the second block": {"lora": replace(QUERIES, targets=("blocks.1.*",))},
    "embedding frozen": {"frozen": ("embedding.*",)},
    "embedding and first block frozen": {"frozen": ("embedding.*", "blocks.0.*")},
    "first attention and second block frozen": {"frozen": ("embedding.*", "blocks.0.attention*", "blocks.1.*")},
    "blocks frozen": {"frozen": ("embedding.*", "blocks.*")},
}
HEAD_ALONE = ("embedding.*", "blocks.*", "final_norm.*")
FEW = [
    ("llama", HEAD_ALONE),
    ("labels", HEAD_ALONE),
    ("llama", ("embedding.*", "head.*", "*.attention.*", "*.mlp.*")),  # norms alone
    ("parallel", ("embedding.*", "blocks.*.attention*")),
    ("parallel-shared", ("embedding.*", "blocks.*.attention.*", "blocks.*.mlp.down.*")),
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_they_are_those_that_torch_counts(name: str, way: str) -> None:
    assert flops_per_token(MODELS[name], LENGTH, **WAYS[way])[0] == counted(MODELS[name], **WAYS[way])


@pytest.mark.parametrize(("name", "frozen"), FEW)
def test_where_few_tensors_train(name: str, frozen: tuple[str, ...]) -> None:
    assert flops_per_token(MODELS[name], LENGTH, frozen=frozen)[0] == counted(MODELS[name], frozen=frozen)


@pytest.mark.parametrize("way", ["all", "lora"])
def test_logits_in_chunks_are_not_made_twice(way: str) -> None:
    in_chunks = counted(FOUR, logits_bytes=4 * FOUR.padded_vocab_size * 5, **WAYS[way])
    assert in_chunks == flops_per_token(FOUR, LENGTH, **WAYS[way])[0]


def test_a_head_alone_has_no_gradient_of_what_it_reads() -> None:
    in_chunks = counted(FOUR, logits_bytes=4 * FOUR.padded_vocab_size * 5, frozen=HEAD_ALONE)
    assert in_chunks == flops_per_token(FOUR, LENGTH, frozen=HEAD_ALONE)[0]


def test_pairs_cost_what_their_tokens_cost() -> None:
    """The reference is computed once, before the run."""
    for way in ("all", "lora"):
        assert flops_per_token(FOUR, LENGTH, **WAYS[way])[0] == counted(FOUR, preference=PreferenceConfig(), **WAYS[way])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dora_multiplies_a_dropped_input_with_the_frozen_matrix_too(dropout: float) -> None:
    lora = LoraConfig(rank=3, dora=True, dropout=dropout)
    whole = {name: shape for name, shape in parameter_shapes(FOUR).items() if is_block_matrix(name)}
    lengths = 2 * lora.rank * sum(prod(shape) for shape in whole.values()) / TOKENS  # of rows, once for all tokens
    assert flops_per_token(FOUR, LENGTH, lora=lora)[0] == pytest.approx(counted(FOUR, lora=lora) - lengths, rel=1e-12)


def test_the_plan_counts_what_the_run_trains() -> None:
    config = pretrain_config("model=gpt2_124m", "precision=fp32")
    plan = make_plan(config, 2)
    assert (plan.flops_per_token_full, plan.flops_per_token_causal) == flops_per_token(config.model, 64)
