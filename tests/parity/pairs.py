"""Tiny random Hugging Face models, and our decoder with the same weights: an independent implementation to agree with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

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

CASES: dict[str, ModelConfig] = {
    "gpt2": _GPT2,
    "gpt2-untied": replace(_GPT2, tied_head=False, num_heads=1, vocab_size=128),
    "llama-gqa": _LLAMA,
    "llama-tied-llama3": replace(_LLAMA, tied_head=True, rope=STRETCHED, num_heads=6, num_kv_heads=2),
    "llama-head-size": replace(_LLAMA, head_size=12, num_kv_heads=1),
    "llama-mha-biases": replace(_LLAMA, bias=True, num_kv_heads=None),
}


def hf_model(model: ModelConfig, seed: int = 0) -> PreTrainedModel:
    """A Hugging Face model of the shape of `model`, its configuration written out here by hand, all weights random."""
    if model.family == "gpt2":
        module: PreTrainedModel = GPT2LMHeadModel(_gpt2_config(model))
    else:
        module = LlamaForCausalLM(_llama_config(model))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():  # norms and biases too: zeros and ones hide a swap
            centre = 1.0 if ("norm" in name or "ln_" in name) and name.endswith("weight") else 0.0
            parameter.normal_(centre, 0.1, generator=generator)
    return module.eval()


def _gpt2_config(model: ModelConfig) -> GPT2Config:
    return GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.max_positions,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_inner=model.ffn_size,
        layer_norm_epsilon=model.norm_epsilon,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=model.tied_head,
        bos_token_id=None,
        eos_token_id=None,
    )


def _llama_config(model: ModelConfig) -> LlamaConfig:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": model.rope.base}
    if model.rope.scaling == "llama3":
        rope |= {
            "rope_type": "llama3",
            "factor": model.rope.factor,
            "low_freq_factor": model.rope.low_frequency_factor,
            "high_freq_factor": model.rope.high_frequency_factor,
            "original_max_position_embeddings": model.rope.original_max_positions,
        }
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_positions,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters=rope,
        attention_bias=model.bias,
        mlp_bias=model.bias,
        tie_word_embeddings=model.tied_head,
        bos_token_id=None,
        eos_token_id=None,
    )


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
        """Parameters of the Hugging Face model, a tied one once."""
        return dict(self.theirs.named_parameters())

    def their_gradients(self) -> dict[str, Tensor]:
        """Gradients of the Hugging Face model by logical name, through the key map."""
        gradients = {name: parameter.grad for name, parameter in self.named_weights().items()}
        return {name: self.keymap.to_logical(name, gradients.__getitem__) for name in self.keymap.logical_shapes}


def make_pair(model: ModelConfig, seed: int = 0) -> Pair:
    """Both models; the key map is checked to cover every weight of the Hugging Face one."""
    theirs = hf_model(model, seed)
    keymap = KeyMap(model)
    keymap.check_foreign({name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()})
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
