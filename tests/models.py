"""Modules of one process with their initial values, for tests that look at a model without an engine."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from train.config.model import ModelConfig
from train.model.blueprint import Blueprint
from train.model.init import draw
from train.model.logical import LogicalTensor, logical_of
from train.model.transformer import Decoder, Reading, build_layers, materialise

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def initial_value(model: ModelConfig, logical: LogicalTensor, seed: int) -> Tensor:
    """The initial value of a rank's slice, of its local shape."""
    values = torch.full((logical.local_numel,), torch.nan)
    draw(model, logical, seed, values)
    return values.view(logical.local_shape)


def initialised(module: ModuleT, model: ModelConfig, seed: int) -> ModuleT:
    """`module` with the initial value of every parameter, whether it lies on meta or not."""
    with torch.no_grad():
        materialise(module, lambda empty: torch.empty(empty.shape))
        for parameter in module.parameters():
            parameter.copy_(initial_value(model, logical_of(parameter), seed).view_as(parameter))
    return module


def initial_decoder(blueprint: Blueprint, reading: Reading, *, seed: int) -> Decoder:
    """The whole model."""
    return initialised(Decoder(build_layers(blueprint, reading)), blueprint.model, seed)
