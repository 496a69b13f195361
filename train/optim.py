"""What the optimizer is given: which parameters decay, and the learning rate as a pure function of position."""

from __future__ import annotations

from math import cos, pi, sqrt

from torch import nn

from train.config.training import OptimConfig, ScheduleConfig
from train.model.logical import logical_parameters
from train.plan import RunPlan


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict]:
    """AdamW's groups: matrices and embeddings decay, norms and biases do not.

    A fused bias has more than one logical axis and still is a bias, so the name decides, not the number of axes.
    """
    decayed, kept = [], []
    for name, parameter in logical_parameters(module).items():
        is_matrix = name.endswith(".weight") and not name.endswith("_norm.weight")
        (decayed if is_matrix else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


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
