"""What the optimizer is given: groups of parameters with their rates, and the learning rate as a pure function of position."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from math import cos, pi, sqrt

from torch import nn

from train.config.training import OptimConfig, ScheduleConfig
from train.model.logical import logical_parameters
from train.plan import RunPlan

# Matrices whose input grows with the width: muP divides their learning rate by how much it has grown.
GROWING = re.compile(r"blocks\.\d+\.(attention\.(qkv|output)|mlp\.(gate_up|up|down))\.weight")


def parameter_groups(module: nn.Module, optim: OptimConfig, *, width_ratio: float = 1.0) -> list[dict]:
    """The optimizer's groups, each with `weight_decay` and `lr_scale`, the multiple of the run's learning rate.

    Matrices and embeddings decay, norms and biases do not, unless a rule says otherwise. A fused bias has more than one
    logical axis and still is a bias, so the name decides, not the number of axes.
    """
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in logical_parameters(module).items():
        is_matrix = name.endswith(".weight") and not name.endswith("_norm.weight")
        scale = 1.0 / width_ratio if GROWING.fullmatch(name) else 1.0
        decay = optim.weight_decay if is_matrix else 0.0
        rule = next((rule for rule in optim.rules if fnmatchcase(name, rule.pattern)), None)
        if rule is not None:
            scale *= rule.lr_scale
            decay = decay if rule.weight_decay is None else rule.weight_decay
        groups.setdefault((not is_matrix, decay, scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (_, decay, scale), parameters in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def lr_at(consumed_samples: int, *, batch: int, optim: OptimConfig, schedule: ScheduleConfig, plan: RunPlan) -> float:
    """Learning rate of the step that begins after `consumed_samples` and reads `batch` samples.

    Position is counted in samples, so a batch ramp or another world size does not move the schedule. The warm-up ends
    on the peak; WSD is Hu et al. 2024 with a linear decay, the inverse square root is Vaswani et al. 2017.
    """
    warmup, total = plan.warmup_samples, plan.total_samples
    if consumed_samples < warmup:
        return optim.lr * min(1.0, (consumed_samples + batch) / warmup)
    if schedule.kind == "constant":
        return optim.lr
    if schedule.kind == "inverse_sqrt":
        return optim.lr * sqrt(warmup / consumed_samples)
    done = min(1.0, (consumed_samples - warmup) / max(1, total - warmup))
    if schedule.kind == "cosine":
        share = 0.5 * (1.0 + cos(pi * done))
    elif schedule.kind == "linear":
        share = 1.0 - done
    else:
        decay_samples = schedule.decay_fraction * total
        share = min(1.0, (total - min(consumed_samples, total)) / decay_samples)
    return optim.lr * (schedule.min_ratio + (1.0 - schedule.min_ratio) * share)
