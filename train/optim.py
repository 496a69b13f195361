"""What the optimizer is given: groups of parameters with their rates, and the learning rate as a pure function of position."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import cos, pi, sqrt

from torch import nn

from conf.errors import UserError
from train.config.training import OptimConfig, ScheduleConfig
from train.model.adapters import MAGNITUDE
from train.model.cost import is_block_matrix
from train.model.logical import logical_parameters
from train.plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """The optimizer's settings, and what of the model and its kernels it depends on."""

    settings: OptimConfig
    width_ratio: float = 1.0
    """How much wider the model is than the one that the learning rate was tuned on (muP)."""
    compile: bool = False
    """Whether the arithmetic of an update may be compiled."""


def parameter_groups(module: nn.Module, spec: OptimizerSpec) -> list[dict]:
    """The optimizer's groups, each with `weight_decay`, `use_muon` and `lr_scale`, the multiple of the run's learning rate.

    What is frozen is in none. Matrices and embeddings decay, norms, biases and the lengths of rows do not, unless a rule
    says otherwise. A fused bias has more than one logical axis and still is a bias, so the name decides. muP divides the
    rate of the blocks' matrices by how much their input has grown; not Muon's, whose updates have the same spectral norm
    at every width.
    Raises UserError when nothing trains.
    """
    optim = spec.settings
    groups: dict[tuple[bool, bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in logical_parameters(module).items():
        if not parameter.requires_grad:
            continue
        is_matrix = name.endswith(".weight") and not name.endswith(("_norm.weight", MAGNITUDE))
        use_muon = optim.kind == "muon" and is_block_matrix(name)
        scale = 1.0 / spec.width_ratio if is_block_matrix(name) else 1.0
        if use_muon:
            scale = optim.muon_lr / optim.lr
        decay = optim.weight_decay if is_matrix else 0.0
        rule = next((rule for rule in optim.rules if fnmatchcase(name, rule.pattern)), None)
        if rule is not None:
            scale *= rule.lr_scale
            decay = decay if rule.weight_decay is None else rule.weight_decay
        groups.setdefault((not is_matrix, use_muon, decay, scale), []).append(parameter)
    if not groups:
        raise UserError("nothing trains: all tensors of the model are frozen; freeze fewer")
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale, "use_muon": use_muon}
        for (_, use_muon, decay, scale), parameters in sorted(groups.items(), key=lambda item: item[0][0])
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
