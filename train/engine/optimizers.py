"""Makes the optimizer that DeepSpeed wraps, and gives its buffers their state before the first step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from train.optim import OptimizerSpec, parameter_groups

# What a checkpoint calls each part of the state -> what the optimizer calls it.
ADAM_STATE = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
MUON_STATE = {"momentum": "momentum_buffer"}


def make_optimizer(module: nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """torch's fused AdamW, or DeepSpeed's Muon with that AdamW for what is not a matrix of a block.

    DeepSpeed must have been told its device before. Given this optimizer it does not build an Adam of its own, which
    would take a compiler and a minute and a half.
    """
    optim, groups = spec.settings, parameter_groups(module, spec)
    adam = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.epsilon, "fused": True}
    if optim.kind == "adamw":
        return torch.optim.AdamW(groups, **adam)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    muon = {"momentum": optim.muon_momentum, "ns_method": optim.newton_schulz}
    groups = [group | (muon if group["use_muon"] else adam) for group in groups]
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=adam)


def update_stance(spec: OptimizerSpec) -> AbstractContextManager:
    """Around an update. DeepSpeed marks Muon's arithmetic for torch.compile, which a run without it must not meet."""
    if spec.settings.kind == "muon" and not spec.compile:
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def state_names(group: dict) -> dict[str, str]:
    """The parts of the state that a group's tensors have, by the name of a checkpoint."""
    return MUON_STATE if group["use_muon"] else ADAM_STATE


def first_state(group: dict, flat: Tensor) -> dict[str, Tensor]:
    """The state of a buffer before its first update."""
    state = {name: torch.zeros_like(flat.data) for name in state_names(group).values()}
    if not group["use_muon"]:
        # The fused kernel wants its counter beside the values.
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
    return state
