"""Which backend computes attention: the one asked for by name or an error, or the first of a device's order that can."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from conf.errors import UserError
from train.config.kernels import AttentionName
from train.model.attention.backend import Backend, Needs
from train.model.attention.flash import Flash2, Flash3, Flash4
from train.model.attention.layout import Layout
from train.model.attention.plain import Eager, Reference
from train.model.attention.scaled_dot_product import CudnnKernel, EfficientKernel, FlashKernel, ScaledDotProduct
from train.model.attention.varlen import TorchVarlen

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Flash4("flash4"),
        Flash3("flash3"),
        Flash2("flash2"),
        TorchVarlen("varlen"),
        ScaledDotProduct("sdpa"),
        CudnnKernel("sdpa_cudnn"),
        FlashKernel("sdpa_flash"),
        EfficientKernel("sdpa_efficient"),
        Eager("eager"),
        Reference("reference"),
    )
}
EAGER_POSITIONS_ON_CPU = 512
"""Up to this length plain products in bf16 beat torch's CPU kernel, 1.8 times at 256; in fp32 never (EXPERIMENTS.md)."""
PROBE_POSITIONS = 128


@dataclass(frozen=True, kw_only=True)
class Attend:
    """Attention over one micro-batch, as one kind of layer wants it: a backend, and what it reads of the documents."""

    backend: Backend
    needs: Needs
    layout: Layout

    def __call__(self, query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, *, dropout: float = 0.0) -> Tensor:
        """Mixed values [T, N, D]. Query head n reads key-value head n // (N / K)."""
        return self.backend.attend(query_TND, key_TKD, value_TKD, needs=self.needs, layout=self.layout, dropout=dropout)


def choose(name: AttentionName, needs: Needs) -> Backend:
    """The backend for `needs`: that of `name`, or with `auto` the first in the device's order that can.

    Raises UserError when the one asked for cannot, or is not installed.
    """
    if name == "auto":
        return next(BACKENDS[candidate] for candidate in preferred(needs) if obstacle(candidate, needs) is None)
    if reason := obstacle(name, needs):
        possible = [other for other in BACKENDS if obstacle(other, needs) is None]
        raise UserError(
            f"kernels.attention={name}: {reason}; use kernels.attention=auto, which takes {choose('auto', needs).name} "
            f"here, or one of {', '.join(possible)}"
        )
    return BACKENDS[name]


def preferred(needs: Needs) -> tuple[str, ...]:
    """The order in which `auto` asks. The last entry can do everything."""
    if needs.device.type != "cuda":
        short = needs.sequence_length <= EAGER_POSITIONS_ON_CPU
        return ("eager",) if short and needs.dtype == torch.bfloat16 else ("sdpa", "eager")
    major = needs.capability[0]
    flash = {8: ("flash2",), 9: ("flash3", "flash2", "flash4")}.get(major, ("flash4", "flash2") if major > 9 else ())
    torch_flash = ("sdpa_cudnn", "varlen") if major > 8 else ("varlen", "sdpa_flash")
    return (*flash, *torch_flash, "sdpa", "eager")


def obstacle(name: str, needs: Needs) -> str | None:
    """What stands against a backend: what it says itself, and on a GPU what happens when it is tried."""
    backend = BACKENDS[name]
    reason = backend.why_not(needs)
    if reason is None and needs.device.type == "cuda" and not isinstance(backend, Eager | Reference):
        reason = _tried(name, replace(needs, sequence_length=min(needs.sequence_length, PROBE_POSITIONS)))
    return reason


@cache
def _tried(name: str, needs: Needs) -> str | None:
    """Run one small sequence forward and backward, so that a kernel which this GPU or build lacks is found at the start."""
    backend, length = BACKENDS[name], needs.sequence_length
    try:
        bounds = torch.tensor([0, length, length], dtype=torch.int32, device=needs.device)
        parts = [
            torch.zeros(length, heads, needs.head_size, dtype=needs.dtype, device=needs.device, requires_grad=True)
            for heads in (needs.num_heads, needs.kv_heads, needs.kv_heads)
        ]
        with torch.enable_grad():
            layout = backend.lay_out(needs, bounds, length)
            backend.attend(*parts, needs=needs, layout=layout, dropout=needs.dropout).sum().backward()
        torch.cuda.synchronize(needs.device)  # a kernel's own errors come late
    except Exception as error:  # every package and compiler has its own errors; all of them mean: not on this machine
        return f"fails on this machine ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return None
