"""A Hugging Face model with PEFT's own adapters, and our decoder with the same weights and adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import peft
import torch
from torch import Tensor, nn

from tests.parity.pairs import Pair, make_pair
from train.config.adapter import LoraConfig
from train.config.kernels import KernelsConfig
from train.config.model import ModelConfig
from train.inference.load import assemble_decoder
from train.model.adapters import adapter_shapes
from train.model.blueprint import Blueprint
from train.model.logical import logical_parameters
from train.model.lora import freeze
from train.model.transformer import Decoder, Reading

# Ours -> theirs, written out by hand for the names of Llama.
THEIRS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
ALL = [name.split(".")[1] for names in THEIRS.values() for name in names]


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Both models."""

    pair: Pair
    lora: LoraConfig
    theirs: nn.Module

    def ours(self, sequence_length: int, *, compile: bool = False, recompute: str = "none") -> Decoder:
        """Our decoder with the adapters that theirs has now; what does not train is frozen."""
        weights = {name: tensor.detach() for name, tensor in self.base_weights().items()}
        adapters = self.their_adapters()

        def read(name: str) -> Tensor:
            return adapters[name] if name in adapters else self.pair.keymap.to_logical(name, weights.__getitem__)

        kernels = KernelsConfig(compile=compile, recompute=recompute)
        blueprint = Blueprint(model=self.pair.model, kernels=kernels, lora=self.lora)
        decoder = assemble_decoder(blueprint, read, reading=Reading(sequence_length=sequence_length, document_mask=False))
        return freeze(decoder, blueprint).train()

    def base_weights(self) -> dict[str, nn.Parameter]:
        """Weights of the Hugging Face model below the adapters, by the names that they had."""
        named = {name.removeprefix("base_model.model."): value for name, value in self.theirs.named_parameters()}
        return {name.replace(".base_layer.", "."): value for name, value in named.items() if "lora_" not in name}

    def their_adapters(self, attribute: str = "data") -> dict[str, Tensor]:
        """Their adapters, or the gradients of these, by our logical names and of our logical shapes."""
        return adapters_as_ours(self.theirs, self.pair.model, self.lora, attribute)


def adapters_as_ours(theirs: nn.Module, model: ModelConfig, lora: LoraConfig, attribute: str = "data") -> dict[str, Tensor]:
    """The adapters of a PEFT model by our logical names and of our logical shapes."""
    named = {name.removeprefix("base_model.model.model."): value for name, value in theirs.named_parameters()}
    found = {}
    for name, shape in adapter_shapes(model, lora).items():
        number, layer, kind = _parts(name)
        word = {"lora_a": "lora_A", "lora_b": "lora_B", "lora_magnitude": "lora_magnitude_vector"}[kind]
        parts = [getattr(named[f"layers.{number}.{there}.{word}.default.weight"], attribute) for there in THEIRS[layer]]
        if kind == "lora_a":
            whole = torch.stack(parts)
        elif layer == "attention.qkv":
            groups = [part.reshape(model.kv_heads, -1, model.head_dim, *part.shape[1:]) for part in parts]
            whole = torch.cat(groups, dim=1)
        else:
            whole = torch.stack(parts)
        found[name] = whole.reshape(shape).clone()
    return found


def _parts(name: str) -> tuple[str, str, str]:
    """Number of the block, layer, kind of the tensor."""
    words = name.split(".")
    return words[1], ".".join(words[2:4]), words[4]


def peft_config(lora: LoraConfig) -> peft.LoraConfig:
    """The same settings in the words of PEFT."""
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=ALL,
        task_type="CAUSAL_LM",
    )


def make_adapters(model: ModelConfig, lora: LoraConfig, *, seed: int = 0) -> Adapters:
    """Both models; the adapters are all random, those that begin at zero too."""
    pair = make_pair(model, seed)
    theirs = peft.get_peft_model(pair.theirs, peft_config(lora))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2, generator=generator))
            elif "lora_" in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    return Adapters(pair=pair, lora=lora, theirs=theirs)


def gradients(decoder: Decoder) -> dict[str, Tensor]:
    """Gradients of what trains, by logical name."""
    named = logical_parameters(decoder).items()
    return {name: value.grad.view(value.logical.shape) for name, value in named if value.requires_grad}


def with_biases(model: ModelConfig) -> ModelConfig:
    """The same model with a bias in every linear layer."""
    return replace(model, bias=True)
