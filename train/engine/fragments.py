"""Where ZeRO keeps the fp32 weight and the optimizer's state of a logical tensor on this rank, as flat views.

DeepSpeed's own maps are used: `_hp_mapping` under stages 1 and 2, `grad_position` under stage 3. Writing into the views
and then calling `publish_weights` is how a checkpoint comes back. What is frozen has no fp32 weight and no state: its
fragments are the weights that the model computes with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config.model import ModelConfig
from train.engine.optimizers import first_state, state_names
from train.model.init import draw
from train.model.logical import LogicalTensor, logical_of, logical_parameters


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """The part [start, start + length) of this rank's flattened slice of one logical tensor, with live views.

    They are fp32; of a frozen tensor there is the weight alone, in the dtype that the model computes in.
    """

    logical: LogicalTensor
    start: int
    length: int
    tensors: dict[str, Tensor]


def flat_partitions(optimizer: Any, zero: int) -> list[Tensor]:
    """The fp32 buffers that the wrapped optimizer steps on."""
    if zero == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # bf16 under stage 1 has a wrapper of its own
        return list(optimizer.fp32_groups_flat_partition)
    return list(optimizer.single_partition_of_fp32_groups)


def create_state(optimizer: Any, zero: int) -> None:
    """Give every buffer its state now, so that memory is claimed and fragments exist at step 0."""
    for group, flat in _buffers(optimizer, zero):
        optimizer.optimizer.state[flat] = first_state(group, flat)


def set_update_count(optimizer: Any, zero: int, updates: int) -> None:
    """Set Adam's count of applied updates on every buffer; each has a counter of its own. Muon's matrices need none."""
    for counter in _counters(optimizer, zero):
        counter.fill_(float(updates))


def update_count(optimizer: Any, zero: int) -> int:
    """Adam's count of applied updates."""
    return int(_counters(optimizer, zero)[0].item())


def _counters(optimizer: Any, zero: int) -> list[Tensor]:
    states = (optimizer.optimizer.state[flat] for flat in flat_partitions(optimizer, zero))
    return [state["step"] for state in states if "step" in state]


def _buffers(optimizer: Any, zero: int) -> list[tuple[dict, Tensor]]:
    """Every buffer with the group that it is of; stage 3 may cut a group into several."""
    buffers = flat_partitions(optimizer, zero)
    if zero == 3:
        return [(optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[i]], flat) for i, flat in enumerate(buffers)]
    return list(zip(optimizer.optimizer.param_groups, buffers, strict=True))


def fragments_of(module: nn.Module, optimizer: Any, zero: int) -> list[Fragment]:
    """Every fragment of what trains that this rank owns, in the order of the layers."""
    find = _place_under_stage_3 if zero == 3 else _place_under_stages_1_and_2
    buffers = _buffers(optimizer, zero)
    found = []
    for parameter in logical_parameters(module).values():
        if not parameter.requires_grad:
            continue
        place = find(parameter, optimizer)
        if place is None:
            continue
        buffer_index, offset, start, length = place
        group, flat = buffers[buffer_index]
        state = optimizer.optimizer.state[flat]
        tensors = {"weight": flat.data.narrow(0, offset, length)}
        tensors |= {kind: state[name].narrow(0, offset, length) for kind, name in state_names(group).items()}
        found.append(Fragment(logical=logical_of(parameter), start=start, length=length, tensors=tensors))
    return found


def frozen_fragments(module: nn.Module, zero: int) -> list[Fragment]:
    """Every fragment of what is frozen that this rank holds; under stages 1 and 2 that is all of its slices."""
    found = []
    for parameter in logical_parameters(module).values():
        if parameter.requires_grad:
            continue
        logical = logical_of(parameter)
        if zero == 3:
            start, length = _part_under_stage_3(parameter)
            flat = parameter.ds_tensor.data.view(-1)
        else:
            start, length = 0, logical.local_numel
            flat = parameter.data.view(-1)
        if length > 0:
            found.append(Fragment(logical=logical, start=start, length=length, tensors={"weight": flat.narrow(0, 0, length)}))
    return found


def draw_weights(found: Iterable[Fragment], *, model: ModelConfig, seed: int) -> None:
    """Give weights their initial values, a rank its own part of them; `publish_weights` has to follow."""
    for piece in found:
        draw(model, piece.logical, seed, piece.tensors["weight"], start=piece.start)


def unset(found: Iterable[Fragment]) -> list[str]:
    """Logical names of the weights whose first or last element is NaN, as all are that nothing was written to."""
    ends = {piece.logical.name: piece.tensors["weight"][0] + piece.tensors["weight"][-1] for piece in found}
    if not ends:
        return []
    is_nan = torch.stack([end.float() for end in ends.values()]).isnan().tolist()  # one wait for a GPU, not one for each
    return [name for name, nan in zip(ends, is_nan, strict=True) if nan]


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Leave out what stage 3 does around every module: it gathers and gives back weights, which all ranks must do alike."""
    kept = [(part, part._forward_pre_hooks, part._forward_hooks) for part in module.modules()]
    try:
        for part, _, _ in kept:
            part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for part, before, after in kept:
            part._forward_pre_hooks, part._forward_hooks = before, after


def publish_weights(optimizer: Any, zero: int) -> None:
    """Copy the fp32 weights into the weights that the model computes with, on all ranks together.

    Of what is frozen too stage 3 keeps small weights whole on every rank, which are put together anew.
    """
    if zero != 3:
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters, has_been_updated=False)
    gather_small(optimizer)


def gather_small(optimizer: Any) -> None:
    """Put together the small weights that stage 3 keeps whole on every rank; it counts on them from step to step.

    Not before it has seen a first pass: in that one it fetches all by itself and lets go of them again, and where they were
    there already, selective recomputation meets fetches in the backward pass that the forward pass had not.
    """
    is_known = optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
    if optimizer.persistent_parameters and is_known:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _place_under_stages_1_and_2(parameter: nn.Parameter, optimizer: Any) -> tuple[int, int, int, int] | None:
    """(buffer, offset in it, start in the parameter, length), or None when another rank owns all of it."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    low, high = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    return mapping.param_group_index, high.start, low.start, low.numel


def _place_under_stage_3(parameter: nn.Parameter, optimizer: Any) -> tuple[int, int, int, int] | None:
    """As above."""
    buffer_index, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start, length = _part_under_stage_3(parameter)
    return None if length <= 0 else (buffer_index, offset, start, length)


def _part_under_stage_3(parameter: nn.Parameter) -> tuple[int, int]:
    """(start, length) of this rank's part. Stage 3 cuts each parameter into equal parts, the last of them padded."""
    part = parameter.ds_tensor.ds_numel
    start = part * dist.get_rank(group=parameter.ds_process_group)
    return start, min(part, parameter.ds_numel - start)
