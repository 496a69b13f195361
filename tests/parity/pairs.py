"""Tiny random Hugging Face models, and our decoder with the same weights: an independent implementation to agree with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.parity import hugging_face
from train.config.kernels import KernelsConfig
from train.config.model import ModelConfig, RopeConfig
from train.convert.keymap import KeyMap
from train.inference.load import assemble_decoder
from train.model.blueprint import Blueprint
from train.model.logical import logical_parameters
from train.model.transformer import Decoder, Reading

VOCAB_SIZE = 101  # not a multiple of 64: 27 padded rows
STRETCHED = RopeConfig(
    base=500.0, scaling="llama3", factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_positions=64
)

_GPT2 = ModelConfig(
    family="gpt2",
    num_layers=2,
    hidden_size=48,
    num_heads=3,
    ffn_size=112,
    max_positions=160,
    vocab_size=VOCAB_SIZE,
    positions="learned",
    norm="layer",
    mlp="gelu",
    bias=True,
    tied_head=True,
)
_LLAMA = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=72,
    num_heads=9,
    num_kv_heads=3,
    ffn_size=100,
    max_positions=160,
    vocab_size=VOCAB_SIZE,
    positions="rotary",
    rope=RopeConfig(base=500.0),
    norm="rms",
    mlp="swiglu",
    bias=False,
    tied_head=False,
)

_QWEN = replace(_LLAMA, family="qwen2", qkv_bias=True, num_heads=6, num_kv_heads=2, rope=RopeConfig(base=900.0))
_GEMMA2 = replace(
    _LLAMA,
    family="gemma2",
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_size=16,
    norm_placement="both",
    norm_one_plus=True,
    mlp="geglu",
    embedding_scale=72**0.5,
    window=23,
    window_pattern="SL",
    attention_scale=20**-0.5,
    attention_softcap=3.0,  # low, so that scores reach it
    logit_softcap=2.0,
    tied_head=True,
)
_GEMMA3 = replace(
    _GEMMA2,
    family="gemma3",
    num_layers=4,
    qk_norm=True,
    window_pattern="SSL",
    rope=RopeConfig(base=3000.0, scaling="linear", factor=8.0),
    local_rope=RopeConfig(base=100.0),
    attention_softcap=None,
    logit_softcap=None,
)
_GPT_NEOX = replace(
    _GPT2,
    family="gpt_neox",
    positions="rotary",
    rope=RopeConfig(base=500.0, fraction=0.25),
    residual="parallel",
    mlp="gelu_exact",
    tied_head=False,
)
_STABLELM = replace(
    _LLAMA,
    family="stablelm",
    norm="layer",
    num_heads=6,
    num_kv_heads=2,
    residual="parallel_shared",
    rope=RopeConfig(base=500.0, fraction=0.5),
)
_EXAONE4 = replace(_LLAMA, family="exaone4", norm_placement="post", qk_norm=True)
_GEMMA = replace(
    _LLAMA,
    family="gemma",
    num_heads=6,
    num_kv_heads=2,
    head_size=16,
    norm_one_plus=True,
    mlp="geglu",
    embedding_scale=72**0.5,
    tied_head=True,
)
_PHI3 = replace(
    _LLAMA,
    family="phi3",
    num_heads=6,
    num_kv_heads=2,
    window=140,
    rope=RopeConfig(
        base=500.0,
        fraction=0.5,
        scaling="longrope",
        factor=2.5,
        original_max_positions=64,
        short_factors=(1.0, 1.1, 1.3),
        long_factors=(1.0, 2.5, 4.0),
    ),
)
_OLMO2 = replace(
    _LLAMA, family="olmo2", num_heads=6, num_kv_heads=2, norm_placement="post", qk_norm=True, qk_norm_across_heads=True
)

CASES: dict[str, ModelConfig] = {
    "gpt2": _GPT2,
    "gpt2-untied": replace(_GPT2, tied_head=False, num_heads=1, vocab_size=128),
    "llama-gqa": _LLAMA,
    "llama-tied-llama3": replace(_LLAMA, tied_head=True, rope=STRETCHED, num_heads=6, num_kv_heads=2),
    "llama-head-size": replace(_LLAMA, head_size=12, num_kv_heads=1),
    "llama-mha-biases": replace(_LLAMA, bias=True, num_kv_heads=None),
    "mistral": replace(_LLAMA, family="mistral", window=37),
    "qwen2": _QWEN,
    "qwen2-tied-linear": replace(_QWEN, tied_head=True, rope=RopeConfig(scaling="linear", factor=4.0)),
    "qwen3": replace(_QWEN, family="qwen3", qkv_bias=None, qk_norm=True, head_size=20),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gpt-neox": _GPT_NEOX,
    "gpt-neox-sequential": replace(_GPT_NEOX, residual="sequential", rope=RopeConfig(fraction=1.0), tied_head=True),
    "stablelm-shared-norm": _STABLELM,
    "stablelm-qkv-bias": replace(_STABLELM, residual="sequential", qkv_bias=True),
    "exaone4": _EXAONE4,
    "phi3": _PHI3,
    "olmo2": _OLMO2,
}


def hf_model(model: ModelConfig, seed: int = 0) -> PreTrainedModel:
    """A Hugging Face model of the shape of `model`, its configuration written out by hand, all weights random."""
    return randomise(hugging_face.build(model), model, seed)


def randomise(module: PreTrainedModel, model: ModelConfig, seed: int = 0) -> PreTrainedModel:
    """Random values for all weights of `module`, which has the shape of `model`; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():  # norms and biases too: zeros and ones hide a swap
            is_weight_of_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
            centre = 1.0 if is_weight_of_norm and not model.norm_one_plus else 0.0
            parameter.normal_(centre, 0.1, generator=generator)
    return module.eval()


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A Hugging Face model, and our decoder with its weights."""

    model: ModelConfig
    theirs: PreTrainedModel
    keymap: KeyMap

    def ours(self, sequence_length: int, *, document_mask: bool = False, recompute: str = "none") -> Decoder:
        """Our decoder, reading sequences of `sequence_length`; in evaluation mode, every parameter with a gradient."""
        weights = {name: tensor.detach() for name, tensor in self.named_weights().items()}
        reading = Reading(sequence_length=sequence_length, document_mask=document_mask)
        decoder = assemble_decoder(
            Blueprint(model=self.model, kernels=KernelsConfig(recompute=recompute)),
            lambda name: self.keymap.to_logical(name, weights.__getitem__),
            reading=reading,
        )
        return decoder.requires_grad_()

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Parameters of the Hugging Face model by their names in files, a tied one once."""
        return hugging_face.named_weights(self.theirs)

    def their_gradients(self) -> dict[str, Tensor]:
        """Gradients of the Hugging Face model by logical name, through the key map."""
        gradients = {name: parameter.grad for name, parameter in self.named_weights().items()}
        return {name: self.keymap.to_logical(name, gradients.__getitem__) for name in self.keymap.logical_shapes}


def make_pair(model: ModelConfig, seed: int = 0) -> Pair:
    """Both models; the key map is checked to cover every weight of the Hugging Face one."""
    theirs = hf_model(model, seed)
    keymap = KeyMap(model)
    keymap.check_foreign({name: tuple(parameter.shape) for name, parameter in hugging_face.named_weights(theirs).items()})
    return Pair(model=model, theirs=theirs, keymap=keymap)


def gradients_of(decoder: Decoder) -> dict[str, Tensor]:
    """Gradients of our decoder by logical name, of their logical shapes."""
    named = logical_parameters(decoder).items()
    return {name: parameter.grad.view(parameter.logical.shape) for name, parameter in named}


def whole_sequence_inputs(num_sequences: int, length: int, *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> tuple:
    """(tokens [T], labels [T], positions [T], bounds) of sequences that are one document each; next-token labels."""
    tokens_BS = torch.randint(vocab_size, (num_sequences, length), generator=torch.Generator().manual_seed(seed))
    labels_BS = torch.cat([tokens_BS[:, 1:], torch.full((num_sequences, 1), -100)], dim=1)
    positions_T = torch.arange(length).repeat(num_sequences)
    bounds = torch.arange(0, (num_sequences + 1) * length, length, dtype=torch.int32)
    return tokens_BS.flatten(), labels_BS.flatten(), positions_T, bounds
