"""What attention is, query by query in float64: an implementation that shares nothing with the one under test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def truth(
    parts: tuple[Tensor, Tensor, Tensor],
    bounds: Sequence[int],
    *,
    window: int | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Mixed values [T, N, D] of queries [T, N, D], keys and values [T, K, D]; documents lie between the `bounds`."""
    query_TND, key_TKD, value_TKD = parts
    group = query_TND.shape[1] // key_TKD.shape[1]
    rows = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        for token in range(start, end):
            first = start if window is None else max(start, token + 1 - window)
            mixed = []
            for head in range(query_TND.shape[1]):
                keys_PD, values_PD = (states[first : token + 1, head // group].double() for states in (key_TKD, value_TKD))
                score_P = (keys_PD @ query_TND[token, head].double()) * scale
                if softcap is not None:
                    score_P = softcap * (score_P / softcap).tanh()
                weight_P = (score_P - score_P.max()).exp()
                mixed.append((weight_P / weight_P.sum()) @ values_PD)
            rows.append(torch.stack(mixed))
    return torch.stack(rows)


def with_gradients(output: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The output, and the gradients of `parts` for a fixed random one of the output."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, parts, direction.to(output.dtype))]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
