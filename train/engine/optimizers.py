"""Makes the optimizer that DeepSpeed wraps, and gives its buffers their state before the first step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.optim import OptimizerSpec, parameter_groups

# What a checkpoint calls each part of the state -> what the optimizer calls it.
ADAM_STATE = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
MUON_STATE = {"momentum": "momentum_buffer"}


def make_optimizer(
    module: nn.Module, spec: OptimizerSpec, *, partitioned: bool = False, group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    """torch's fused AdamW, or Muon with that AdamW for what is not a matrix of a block.

    DeepSpeed must have been told its device before. Given this optimizer it does not build an Adam of its own, which
    would take a compiler and a minute and a half. `partitioned`: Muon is given flat partitions of clipped gradients, one of
    each rank of `group` (None: of all); otherwise whole matrices, or DeepSpeed's wrapper of bf16 runs Newton-Schulz itself.
    """
    optim, groups = spec.settings, parameter_groups(module, spec)
    adam = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.epsilon, "fused": True}
    if optim.kind == "adamw":
        return torch.optim.AdamW(groups, **adam)
    if partitioned:
        return PartitionedMuon(groups, momentum=optim.muon_momentum, process_group=group, **adam)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    muon = {"momentum": optim.muon_momentum, "ns_method": optim.newton_schulz}
    groups = [values | (muon if values["use_muon"] else adam) for values in groups]
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=adam)


class PartitionedMuon(torch.optim.AdamW):
    """Muon in fp32 on the flat partitions of ZeRO 1 and 2, and AdamW for the groups without `use_muon`.

    Outside of its bf16 wrapper DeepSpeed's own Muon orthogonalizes before it takes the norm, and then clips the update
    instead of the gradient. Here gradients arrive reduced and clipped, and all of Muon comes after that.
    """

    def __init__(self, groups: list[dict], *, momentum: float, process_group: dist.ProcessGroup | None, **adam: Any) -> None:
        # ZeRO puts one flat partition in the place of a group's matrices, in their order: the shapes are kept beside it.
        super().__init__([group | {"shapes": [value.shape for value in group["params"]]} for group in groups], **adam)
        self._momentum, self._process_group = momentum, process_group

    @torch.no_grad()
    def step(self) -> None:
        groups = self.param_groups
        for group in groups:
            if group["use_muon"]:
                self._step_matrices(group)
        self.param_groups = [group for group in groups if not group["use_muon"]]
        super().step()
        self.param_groups = groups

    def _step_matrices(self, group: dict) -> None:
        (flat,) = group["params"]
        momentum = self.state[flat]["momentum_buffer"]
        momentum.lerp_(flat.grad, 1 - self._momentum)
        partition = flat.grad.lerp(momentum, self._momentum)  # Nesterov
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        size = flat.numel()
        first, end = dist.get_rank(self._process_group) * size, 0
        for shape in group["shapes"]:
            start, end = end, end + shape.numel()
            low, high = max(start, first), min(end, first + size)
            here, there = slice(low - first, high - first), slice(low - start, high - start)
            whole = partition[here]
            if start // size < (end - 1) // size:  # several ranks hold a part: put together one matrix at a time
                whole = partition.new_zeros(end - start)
                if low < high:
                    whole[there] = partition[here]
                dist.all_reduce(whole, group=self._process_group)
            if low < high:
                flat[here].sub_(newton_schulz(whole.view(shape)).reshape(-1)[there], alpha=group["lr"])


def newton_schulz(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, times sqrt(rows / columns) where it is tall; in the dtype of `matrix`.

    Five quintic steps with the coefficients of Jordan et al. 2024, which leave singular values between 0.7 and 1.2.
    """
    rows, columns = matrix.shape
    x = matrix if rows <= columns else matrix.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if rows <= columns else x.mT * sqrt(rows / columns)


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
