"""Every backend that this machine can run against float64, forward and gradients; the flash-attn calls by their signatures."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from tests.parity.attention_truth import relative_error, truth, with_gradients
from train.model.attention import BACKENDS, Attend, Needs
from train.model.attention.choice import obstacle
from train.model.attention.flash import Functions

SEQUENCES, LENGTH = 2, 20
WHOLE = (0, 20, 40)
# An empty document at the start, in the middle and at the end; documents of one token at the start and at the end.
DOCUMENTS = (0, 0, 1, 9, 9, 16, 20, 20, 39, 40, 40, 40)
HEADS = ((4, 4), (4, 2), (3, 1))
SIZES = (64, 80, 128)
WINDOWS = (None, 1, 6)
# Greatest relative error of the output and of a gradient. Rounding a result to bf16 alone makes 1.7e-3.
BOUNDS = {torch.float32: (1e-6, 2e-6), torch.bfloat16: (4e-3, 8e-3)}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ON_A_CPU = ("sdpa", "sdpa_flash", "eager", "reference")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of a shape, and what float64 makes of them."""

    needs: Needs
    parts: tuple[Tensor, Tensor, Tensor]
    expected: list[Tensor]

    def found(self, name: str) -> list[Tensor]:
        """Output and gradients of a backend."""
        attend = self.attend(name)
        return with_gradients(attend(*self.parts), self.parts)

    def attend(self, name: str) -> Attend:
        bounds = torch.tensor(DOCUMENTS, dtype=torch.int32, device=self.needs.device)
        layout = BACKENDS[name].lay_out(self.needs, bounds, SEQUENCES * LENGTH)
        return Attend(backend=BACKENDS[name], needs=self.needs, layout=layout)


@cache
def make_case(needs: Needs) -> Case:
    generator = torch.Generator().manual_seed(3)
    heads = (needs.num_heads, needs.kv_heads, needs.kv_heads)
    parts = [torch.randn(SEQUENCES * LENGTH, number, needs.head_size, generator=generator).to(needs.dtype) for number in heads]
    bounds = DOCUMENTS if needs.packed else WHOLE
    exact = tuple(states.detach().double().requires_grad_() for states in parts)
    output = truth(exact, bounds, window=needs.window, scale=needs.scale, softcap=needs.softcap)
    here = tuple(states.detach().to(needs.device).requires_grad_() for states in parts)
    return Case(needs=needs, parts=here, expected=with_gradients(output, exact))


def needs_of(heads: tuple[int, int], size: int, **rest: Any) -> Needs:
    return Needs(num_heads=heads[0], kv_heads=heads[1], head_size=size, sequence_length=LENGTH, **{"scale": size**-0.5, **rest})


def check(case: Case, found: list[Tensor]) -> None:
    most_output, most_gradient = BOUNDS[case.needs.dtype]
    assert found[0].dtype == case.needs.dtype
    output, *gradients = (values.cpu() for values in found)
    assert relative_error(output, case.expected[0]) < most_output
    for gradient, expected in zip(gradients, case.expected[1:], strict=True):
        # With a window of 1 the softmax is over one key, and queries and keys have no gradient to be relative to.
        size = expected if expected.norm() > 1e-9 else case.expected[-1]
        assert (gradient - expected).norm() / size.norm() < most_gradient


PRODUCT = list(itertools.product(HEADS, SIZES, WINDOWS, (False, True), BOUNDS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_against_float64(name: str, device: str) -> None:
    """The product of grouped heads, head sizes, windows, packed documents or whole sequences, and dtypes; what can run."""
    shown = 0
    for heads, size, window, packed, dtype in PRODUCT:
        needs = needs_of(heads, size, window=window, packed=packed, dtype=dtype, device=torch.device(device))
        if obstacle(name, needs) is None:
            case = make_case(needs)
            check(case, case.found(name))
            shown += 1
    if device == "cpu":
        assert shown == (len(PRODUCT) if name in ON_A_CPU else 0)


@pytest.mark.parametrize("name", ["eager", "reference"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_softcap_and_scale(name: str, dtype: torch.dtype) -> None:
    for heads, window in itertools.product(HEADS, WINDOWS):
        case = make_case(needs_of(heads, 64, window=window, packed=True, dtype=dtype, softcap=1.5, scale=0.3))
        check(case, case.found(name))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_dropout_drops_weights_and_keeps_their_mean(name: str) -> None:
    case = make_case(needs_of((4, 2), 64, packed=True, dtype=torch.float32))
    attend = case.attend(name)
    torch.manual_seed(1)
    with torch.no_grad():
        drawn = torch.stack([attend(*case.parts, dropout=0.5) for _ in range(400)])
    assert not torch.equal(drawn[0], drawn[1])
    assert relative_error(drawn.mean(dim=0), case.expected[0]) < 0.1


# --- kernels that need a GPU: their functions are stood in for, with the parameters that the real ones have

_LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
_TWO = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
_THREE = (
    "softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa "
    "deterministic sm_margin"
)
_FOUR = (
    "softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa deterministic score_mod score_mod_bwd mask_mod"
)
PARAMETERS = {
    ("flash2", "fixed"): f"q k v {_TWO}",
    ("flash2", "varlen"): f"q k v {_LENGTHS} {_TWO} block_table",
    ("flash3", "fixed"): f"q k v {_THREE}",
    ("flash3", "varlen"): f"q k v {_LENGTHS} seqused_q seqused_k {_THREE}",
    ("flash4", "fixed"): f"q k v qv gather_kv_indices {_FOUR} aux_tensors aux_scalars block_sparse_tensors "
    "block_sparse_tensors_bwd return_lse",
    ("flash4", "varlen"): f"q k v qv {_LENGTHS} min_seqlen_k seqused_q seqused_k gather_kv_indices page_table {_FOUR} "
    "block_sparse_tensors aux_tensors aux_scalars return_lse scheduler_metadata seqlen_k_per_split disable_scheduler_metadata",
}
"""Names of the parameters in order, of flash-attn v2.8.3 (2 and 3) and of flash-attn-4 at commit 0251105."""
UNLIMITED = {"flash2": -1, "flash3": -1, "flash4": None}


def stand_in(name: str, kind: str) -> Any:
    """A function with the real one's parameters that does what its documentation says, in float64."""
    parameters = [inspect.Parameter(word, inspect.Parameter.POSITIONAL_OR_KEYWORD) for word in PARAMETERS[name, kind].split()]
    signature = inspect.Signature(parameters)

    def call(*positional: Any, **keywords: Any) -> Any:
        given = signature.bind_partial(*positional, **keywords).arguments
        assert given["causal"] is True and given["deterministic"] is True
        before, after = given["window_size"]
        assert after == 0
        parts = tuple(given[word].flatten(0, -3) for word in "qkv")  # [B, S, N, D] or [T, N, D]
        if kind == "varlen":
            assert given["max_seqlen_q"] == given["max_seqlen_k"] == LENGTH
            assert torch.equal(given["cu_seqlens_q"], given["cu_seqlens_k"]) and given["cu_seqlens_q"].dtype == torch.int32
            bounds = given["cu_seqlens_q"].tolist()
        else:
            assert given["q"].shape[:2] == (SEQUENCES, LENGTH)
            bounds = WHOLE
        output = truth(
            parts,
            bounds,
            window=None if before == UNLIMITED[name] else before + 1,
            scale=given["softmax_scale"],
            softcap=given["softcap"] or None,
        ).to(given["q"].dtype)
        output = output.view(given["q"].shape)
        return (output, None) if name == "flash4" else output

    return call


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", UNLIMITED)
def test_flash_attn_is_called_by_its_signature(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = Functions(fixed=stand_in(name, "fixed"), varlen=stand_in(name, "varlen"))
    monkeypatch.setitem(vars(BACKENDS[name]), "functions", functions)
    for window, softcap in itertools.product(WINDOWS, (None, 1.5)):
        case = make_case(needs_of((4, 2), 64, window=window, packed=packed, dtype=torch.float32, softcap=softcap, scale=0.3))
        check(case, case.found(name))


@pytest.mark.parametrize("name", UNLIMITED)
def test_recorded_signatures_are_those_of_what_is_installed(name: str) -> None:
    """Holds the record against the packages, on a machine that has them."""
    try:
        functions = BACKENDS[name].load()
    except (ImportError, OSError):
        return
    for kind in ("fixed", "varlen"):
        keywords = BACKENDS[name].keywords(needs_of((4, 2), 64, packed=True), 0.0)
        assert set(keywords) <= set(inspect.signature(getattr(functions, kind)).parameters)


def test_dropout_reaches_flash_attn_2() -> None:
    needs = needs_of((4, 2), 64, packed=True, dropout=0.1)
    assert BACKENDS["flash2"].keywords(needs, 0.1)["dropout_p"] == 0.1
    assert "dropout_p" not in BACKENDS["flash3"].keywords(needs, 0.0)


@pytest.mark.parametrize("packed", [False, True])
def test_varlen_attn_is_called_by_its_signature(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = inspect.signature(varlen.varlen_attn)

    def call(*positional: Any, **keywords: Any) -> Tensor:
        given = signature.bind(*positional, **keywords).arguments
        before, after = given["window_size"]
        assert after == 0 and given["enable_gqa"] and given["max_q"] == given["max_k"] == LENGTH
        assert all(given[word].is_contiguous() for word in ("query", "key", "value"))
        parts = (given["query"], given["key"], given["value"])
        window = None if before == -1 else before + 1
        assert torch.equal(given["cu_seq_q"], given["cu_seq_k"])
        return truth(parts, given["cu_seq_q"].tolist(), window=window, scale=given["scale"]).to(given["query"].dtype)

    monkeypatch.setattr(varlen, "varlen_attn", call)
    for window in WINDOWS:
        case = make_case(needs_of((4, 2), 64, window=window, packed=packed, dtype=torch.float32))
        check(case, case.found("varlen"))


def test_layouts_of_lengths_hold_nothing_of_s_by_s() -> None:
    needs = needs_of((4, 2), 64, packed=True, window=6)
    bounds = torch.tensor(DOCUMENTS, dtype=torch.int32)
    for name in ("flash2", "flash3", "flash4", "varlen"):
        layout = BACKENDS[name].lay_out(needs, bounds, SEQUENCES * LENGTH)
        assert layout.bounds is bounds and layout.mask is None
        whole = BACKENDS[name].lay_out(replace(needs, packed=False), bounds, SEQUENCES * LENGTH)
        assert whole.bounds.tolist() == list(WHOLE) and whole.bounds.dtype == torch.int32 and whole.mask is None
    for name in ("sdpa", "sdpa_flash"):
        assert BACKENDS[name].lay_out(needs_of((4, 2), 64, packed=False), bounds, SEQUENCES * LENGTH).mask is None
