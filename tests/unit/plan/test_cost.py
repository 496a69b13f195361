"""Parameters against transformers, memory within reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conf.compose import CONF_FOLDER
from tests.parity import hugging_face
from tests.parity.custom import CUSTOM
from tests.parity.pairs import CASES
from tests.unit.config.words import pretrain_config
from train.config.adapter import LoraConfig
from train.config.kernels import KernelsConfig
from train.config.model import ModelConfig
from train.model import cost
from train.model.adapters import trained_shapes
from train.model.blueprint import Blueprint
from train.model.logical import logical_parameters
from train.model.transformer import Decoder, Reading, build_layers
from train.plan import make_plan


def model(name: str) -> ModelConfig:
    settings = pretrain_config(f"model={name}").model
    return settings if settings.vocab_size is not None else replace(settings, vocab_size=2000)


def test_gpt2_is_gpt2() -> None:
    gpt2 = model("gpt2_124m")
    assert (gpt2.vocab_size, gpt2.padded_vocab_size) == (50257, 50304)
    assert cost.num_parameters(gpt2) - (50304 - 50257) * 768 == 124_439_808
    assert transformers_count(gpt2) == 124_439_808


# From the published files' own headers, each tied matrix once.
PUBLISHED = {
    "llama_1b": 1_235_814_400,
    "llama_8b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
    "mistral_7b": 7_241_732_096,
    "qwen2_0_5b": 494_032_768,
    "qwen2_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "pythia_160m": 162_322_944,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_size(name: str) -> None:
    published = model(name)
    assert published.padded_vocab_size == published.vocab_size
    assert cost.num_parameters(published) == PUBLISHED[name] == transformers_count(published)
    if "llama" not in name:
        first_line = (CONF_FOLDER / f"model/{name}.yaml").read_text().splitlines()[0]
        assert f" {PUBLISHED[name]:,} parameters." in first_line


@pytest.mark.parametrize("name", ["gpt2_tiny", "llama_tiny", "llama_mini", "llama_160m", "llama_quickstart", "qwen3_tiny"])
def test_small_models_have_what_transformers_counts(name: str) -> None:
    settings = model(name)
    padding = (settings.padded_vocab_size - settings.vocab_size) * settings.hidden_size
    assert cost.num_parameters(settings) - padding * (1 if settings.tied_head else 2) == transformers_count(settings)


def transformers_count(settings: ModelConfig) -> int:
    """Parameters of the model as transformers makes it from the same numbers; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in hugging_face.build(settings).parameters())


ALL_CASES = CASES | {name: settings for name, (settings, *_) in CUSTOM.items()}


@pytest.mark.parametrize("case", ALL_CASES)
def test_what_is_counted_is_what_is_built(case: str) -> None:
    settings = ALL_CASES[case]
    with torch.device("meta"):
        decoder = Decoder(build_layers(Blueprint(model=settings), Reading(sequence_length=8, document_mask=False)))
    built = {name: tuple(parameter.logical.shape) for name, parameter in logical_parameters(decoder).items()}
    assert list(built.items()) == list(cost.parameter_shapes(settings).items())
    assert cost.num_parameters(settings) == sum(parameter.numel() for parameter in decoder.parameters())


@pytest.mark.parametrize("case", CUSTOM)
def test_other_families_shapes_have_what_transformers_counts(case: str) -> None:
    settings, _, build = CUSTOM[case]
    padding = 2 * (settings.padded_vocab_size - settings.vocab_size) * settings.hidden_size
    with torch.device("meta"):
        theirs = sum(parameter.numel() for parameter in build(settings).parameters())
    assert cost.num_parameters(settings) - padding == theirs


def test_a_rank_has_the_norms_of_its_heads() -> None:
    settings = CUSTOM["olmo2"][0]
    whole = cost.num_parameters(replace(settings, qk_norm=False, qk_norm_across_heads=False))
    halved = cost.parameters_per_rank(replace(settings, qk_norm=False, qk_norm_across_heads=False), 2)
    width = (settings.num_heads + settings.kv_heads) * settings.head_dim
    assert cost.num_parameters(settings) - whole == settings.num_layers * width
    assert cost.parameters_per_rank(settings, 2) - halved == settings.num_layers * width // 2
    by_head = replace(settings, qk_norm_across_heads=False)  # of which every rank has all
    assert cost.parameters_per_rank(by_head, 2) - halved == settings.num_layers * 2 * settings.head_dim


def test_biases_of_a_llama_are_counted() -> None:
    settings = replace(model("llama_tiny"), bias=True, tied_head=False)
    padding = 2 * (settings.padded_vocab_size - settings.vocab_size) * settings.hidden_size
    assert cost.num_parameters(settings) - padding == transformers_count(settings)


def memory(
    name: str, *, zero: int, ranks: int, bytes_per_value: int = 2, recompute: str = "none", tensor: int = 1
) -> cost.MemoryEstimate:
    return cost.memory_per_rank(
        model(name),
        micro_tokens=8192,
        data_parallel=ranks,
        zero=zero,
        bytes_per_value=bytes_per_value,
        tensor_parallel=tensor,
        kernels=KernelsConfig(recompute=recompute, logits_bytes=1 << 40),
    )


def test_memory_of_the_model_state_by_hand() -> None:
    """18 bytes a parameter on one rank in bf16 with fp32 accumulation (2 + 4 + 12); ZeRO cuts what it shards by the ranks."""
    parameters = 8_030_261_248
    alone = memory("llama_8b", zero=1, ranks=1)
    assert alone.weights + alone.gradients + alone.optimizer == 18 * parameters
    shard = parameters // 64
    for zero, parts in {1: (2, 4), 2: (2, 4 / 64), 3: (2 / 64, 4 / 64)}.items():
        found = memory("llama_8b", zero=zero, ranks=64)
        assert (found.weights, found.gradients) == pytest.approx((parts[0] * parameters, parts[1] * parameters))
        assert found.optimizer == 12 * shard
    assert memory("llama_8b", zero=1, ranks=1, bytes_per_value=4).weights == 4 * parameters


def test_muon_has_one_moment_of_the_blocks_matrices() -> None:
    def optimizer(muon: bool) -> int:
        trained = cost.Trained(shapes=cost.parameter_shapes(model("gpt2_124m")), muon=muon)
        return cost.memory_per_rank(
            model("gpt2_124m"), micro_tokens=1, data_parallel=2, tensor_parallel=1, zero=1, bytes_per_value=2,
            kernels=KernelsConfig(), trained=trained,
        ).optimizer  # fmt: skip

    matrices = 12 * 12 * 768 * 768  # per block 3 + 1 of attention, 4 + 4 of the MLP
    assert optimizer(False) - optimizer(True) == 4 * matrices / 2


FROZEN = ("embedding.*", "blocks.0.*")


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(
    ("lora", "frozen"), [(LoraConfig(rank=4), ()), (LoraConfig(rank=4, dora=True), ()), (None, FROZEN)], ids=str
)
def test_what_is_frozen_has_no_gradients_and_no_moments(zero: int, lora: LoraConfig | None, frozen: tuple[str, ...]) -> None:
    settings = replace(model("llama_160m"), num_layers=2, vocab_size=1000)
    blueprint = Blueprint(model=settings, lora=lora, frozen=frozen)
    decoder = Decoder(build_layers(blueprint, Reading(sequence_length=8, document_mask=False)))
    held = sum(parameter.numel() for parameter in decoder.parameters())
    learned = sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)
    found = cost.memory_per_rank(
        settings, micro_tokens=8, data_parallel=2, tensor_parallel=1, zero=zero, bytes_per_value=2, kernels=KernelsConfig(),
        trained=cost.Trained(shapes=trained_shapes(settings, lora=lora, frozen=frozen)),
    )  # fmt: skip
    parts = (1 if zero < 3 else 2, 1 if zero == 1 else 2)
    assert (found.weights, found.gradients, found.optimizer) == (2 * held // parts[0], 4 * learned // parts[1], 6 * learned)


def test_ranks_share_adapters_as_they_share_their_layers() -> None:
    """Of query-key-value and of gate and up the second matrix is cut, of what sums over the ranks the first."""
    settings, lora = model("llama_160m"), LoraConfig(rank=4, dora=True)
    width, inner, heads = settings.hidden_size, settings.ffn_size, settings.num_heads * settings.head_dim
    fused = heads + 2 * settings.kv_heads * settings.head_dim
    firsts = 4 * (3 * width + heads // 2 + 2 * width + inner // 2)
    seconds = 4 * (fused // 2 + width + 2 * inner // 2 + width)
    lengths = fused // 2 + width + 2 * inner // 2 + width
    found = cost.memory_per_rank(
        settings, micro_tokens=8, data_parallel=1, tensor_parallel=2, zero=1, bytes_per_value=2, kernels=KernelsConfig(),
        trained=cost.Trained(shapes=trained_shapes(settings, lora=lora, frozen=())),
    )  # fmt: skip
    assert found.gradients == 4 * settings.num_layers * (firsts + seconds + lengths)


def test_memory_is_sane() -> None:
    """An 8 B model fits on 64 cards of 80 GiB with ZeRO 3 and not on one; recomputation spares activations, not logits."""
    assert 1 < memory("llama_8b", zero=3, ranks=64).total / cost.GIB < 80 < memory("llama_8b", zero=1, ranks=1).total / cost.GIB
    kept, again = memory("llama_8b", zero=3, ranks=64), memory("llama_8b", zero=3, ranks=64, recompute="full")
    assert again.activations < kept.activations / 4 and again.logits == kept.logits
    assert kept.total == kept.weights + kept.gradients + kept.optimizer + kept.activations + kept.logits


def test_plan_carries_the_cost() -> None:
    config = pretrain_config("model=gpt2_124m", "precision=fp32")
    plan = make_plan(config, 2)
    assert plan.parameters == cost.num_parameters(config.model)
    assert plan.memory.weights == 4 * plan.parameters
