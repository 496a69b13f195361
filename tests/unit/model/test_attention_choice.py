"""Which backend is chosen for which device and need, and what is said when the one asked for cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo

from conf.errors import UserError
from tests.models import initialised
from tests.parity.pairs import CASES
from train.config.kernels import KernelsConfig
from train.config.model import RopeConfig
from train.model.attention import BACKENDS, Needs, choice, choose
from train.model.attention.flash import Flash, Functions
from train.model.blueprint import Blueprint
from train.model.transformer import Decoder, Reading, build_layers

ON_A_CPU = Needs(num_heads=4, kv_heads=2, head_size=64, sequence_length=256, packed=True, scale=0.125)
ON_A_GPU = replace(ON_A_CPU, dtype=torch.bfloat16, device=torch.device("cuda"), sequence_length=4096)
MODEL = replace(CASES["llama-gqa"], family="custom")
ALL = ("flash2", "flash3", "flash4")


def load(backend: Flash) -> Functions:
    return Functions(fixed=print, varlen=print)


def load_nothing(backend: Flash) -> Functions:
    raise ImportError(f"No module named '{backend.package}'")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Pretends a GPU of a compute capability, where every kernel that says it can does, and some flash-attn is installed."""

    def pretend(capability: tuple[int, int], installed: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(Needs, "capability", capability)
        monkeypatch.setattr(choice, "_tried", lambda name, needs: None)
        for name in ALL:
            monkeypatch.delitem(vars(BACKENDS[name]), "functions", raising=False)
            monkeypatch.setattr(type(BACKENDS[name]), "load", load if name in installed else load_nothing)

    return pretend


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "sdpa"),
        ({"dtype": torch.bfloat16}, "eager"),
        ({"dtype": torch.bfloat16, "sequence_length": 512}, "eager"),
        ({"dtype": torch.bfloat16, "sequence_length": 513}, "sdpa"),
        ({"sequence_length": 2048, "softcap": 30.0}, "eager"),
        ({"sequence_length": 2048, "window": 64, "dropout": 0.1}, "sdpa"),
    ],
    ids=str,
)
def test_auto_on_a_cpu(changes: dict, expected: str) -> None:
    assert choose("auto", replace(ON_A_CPU, **changes)).name == expected


WHOLE = {"packed": False}
CAPPED = {"softcap": 30.0}
DROPPING = {"dropout": 0.1}


@pytest.mark.parametrize(
    ("capability", "installed", "changes", "expected"),
    [
        ((9, 0), ALL, {}, "flash3"),
        ((9, 0), ("flash2", "flash4"), {}, "flash2"),
        ((9, 0), ("flash4",), {}, "flash4"),
        ((9, 0), (), {}, "varlen"),
        ((9, 0), (), WHOLE, "sdpa_cudnn"),
        ((9, 0), (), WHOLE | {"window": 64}, "varlen"),
        ((9, 0), (), CAPPED, "eager"),
        ((9, 0), ALL, CAPPED, "flash3"),
        ((9, 0), ALL, DROPPING, "flash2"),
        ((9, 0), ("flash2",), DROPPING | CAPPED, "eager"),
        ((9, 0), (), DROPPING, "sdpa"),
        ((9, 0), ALL, {"head_size": 256}, "flash2"),
        ((9, 0), ALL, {"head_size": 60}, "sdpa"),
        ((9, 0), ALL, {"dtype": torch.float32}, "sdpa"),
        ((10, 0), ALL, {}, "flash4"),
        ((10, 0), (), WHOLE, "sdpa_cudnn"),
        ((12, 0), ALL, {}, "flash2"),
        ((8, 0), ALL, {}, "flash2"),
        ((8, 0), (), WHOLE, "varlen"),
        ((8, 0), (), WHOLE | DROPPING, "sdpa_flash"),
        ((7, 0), ALL, {}, "sdpa"),
    ],
    ids=str,
)
def test_auto_on_a_gpu(gpu, capability: tuple, installed: tuple, changes: dict, expected: str) -> None:
    gpu(capability, installed)
    assert choose("auto", replace(ON_A_GPU, **changes)).name == expected


@pytest.mark.parametrize("name", ["flash4", "flash3", "flash2", "varlen", "sdpa_cudnn", "sdpa_efficient"])
def test_a_gpu_kernel_asked_for_on_a_cpu(name: str) -> None:
    with pytest.raises(UserError) as caught:
        choose(name, ON_A_CPU)
    assert str(caught.value) == (
        f"kernels.attention={name}: needs a CUDA device, not cpu; use kernels.attention=auto, which takes sdpa here, "
        "or one of sdpa, sdpa_flash, eager, reference"
    )


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("sdpa", CAPPED, "has no soft-cap (model.attention_softcap)"),
        ("sdpa_flash", DROPPING, "the CPU kernel has no dropout (model.dropout)"),
    ],
)
def test_what_a_cpu_kernel_cannot(name: str, changes: dict, reason: str) -> None:
    with pytest.raises(UserError, match=f"kernels.attention={name}: ") as caught:
        choose(name, replace(ON_A_CPU, **changes))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "capability", "changes", "reason"),
    [
        ("flash2", (9, 0), {}, "the package flash_attn is not installed or does not load (No module named 'flash_attn')"),
        ("flash3", (9, 0), {}, "the package flash_attn_interface is not installed or does not load"),
        ("flash4", (9, 0), {}, "the package flash_attn.cute is not installed or does not load"),
        ("flash3", (10, 0), {}, "runs on compute capability 9.x; the device has 10.0"),
        ("flash3", (9, 0), {"head_size": 256}, "the head size must be a multiple of 8 up to 192, not 256"),
        ("flash3", (9, 0), DROPPING, "the package has no dropout (model.dropout)"),
        ("flash2", (9, 0), DROPPING | CAPPED, "the package has no dropout together with a soft-cap"),
        ("flash2", (9, 0), {"dtype": torch.float32}, "computes in bf16 or fp16, not in torch.float32"),
        ("varlen", (9, 0), {"dtype": torch.float32}, "computes in bf16 or fp16, not in torch.float32"),
        ("varlen", (7, 0), {}, "needs compute capability 8.0 (A100), the device has 7.0"),
        ("varlen", (9, 0), CAPPED, "varlen_attn has no soft-cap"),
        ("varlen", (9, 0), DROPPING, "varlen_attn has no dropout"),
        ("varlen", (9, 0), {"head_size": 60}, "the head size must be a multiple of 8 up to 256, not 60"),
        ("sdpa_cudnn", (9, 0), {}, "takes no lengths of documents through this call (data.document_mask=true)"),
        ("sdpa_flash", (9, 0), WHOLE | {"window": 64}, "takes no window through this call (model.window=64)"),
        ("sdpa_flash", (9, 0), {"dtype": torch.float32}, "computes in bf16 or fp16, not in torch.float32"),
        ("sdpa_cudnn", (9, 0), {"dtype": torch.float32}, "computes in bf16 or fp16, not in torch.float32"),
        ("sdpa_efficient", (9, 0), {}, "the kernel shares no keys between queries (model.num_kv_heads below"),
    ],
    ids=str,
)
def test_what_a_gpu_kernel_cannot(gpu, name: str, capability: tuple, changes: dict, reason: str) -> None:
    gpu(capability)
    with pytest.raises(UserError, match=f"kernels.attention={name}: ") as caught:
        choose(name, replace(ON_A_GPU, **changes))
    assert reason in str(caught.value) and "use kernels.attention=auto, which takes " in str(caught.value)


def test_a_kernel_that_fails_when_tried_is_an_obstacle() -> None:
    """A package built for another GPU or another torch says so only when it runs; on a CPU varlen_attn fails like that."""
    reason = choice._tried("varlen", replace(ON_A_CPU, sequence_length=64))
    assert reason.startswith("fails on this machine (NotImplementedError: ")
    assert choice._tried("sdpa_efficient", ON_A_CPU).startswith("fails on this machine (RuntimeError: ")


def layers(kernel: str, *, length: int = 32, **changes: object) -> list:
    model, kernels = replace(MODEL, **changes), KernelsConfig(attention=kernel)
    blueprint = Blueprint(model=model, kernels=kernels, dtype=torch.bfloat16)
    return build_layers(blueprint, Reading(sequence_length=length, document_mask=True))


def test_it_is_refused_when_the_layers_are_listed() -> None:
    """Before a weight is made, and so before anything is trained."""
    with pytest.raises(UserError, match="kernels.attention=flash3: needs a CUDA device"):
        layers("flash3")


def test_the_choice_is_shown_and_made_again_for_another_reading() -> None:
    decoder = Decoder(layers("auto"))
    assert decoder.attention_line == "eager"
    decoder.read_as(Reading(sequence_length=1024, document_mask=False))
    assert decoder.attention_line == "sdpa"


def test_layers_with_and_without_a_window_choose_apart(gpu) -> None:
    gpu((9, 0))
    model = replace(MODEL, num_layers=4, window=64, window_pattern="SSL", head_size=64)
    blueprint = Blueprint(model=model, device=torch.device("cuda"), dtype=torch.bfloat16)
    decoder = Decoder(build_layers(blueprint, Reading(sequence_length=128, document_mask=False)))
    assert [block.attention.window for block in decoder.blocks] == [64, 64, None, 64]
    assert decoder.attention_line == "varlen (window 64), sdpa_cudnn (full)"


GEMMA = {"local_rope": RopeConfig(base=50.0), "qk_norm": True, "norm_placement": "both", "norm_one_plus": True, "mlp": "geglu"}


@pytest.mark.parametrize(("kernel", "changes"), [("eager", {}), ("sdpa", {}), ("sdpa_flash", {}), ("sdpa", GEMMA)])
def test_a_block_compiles_into_one_graph_for_every_batch(kernel: str, changes: dict) -> None:
    changes |= {"num_layers": 3, "window": 8, "window_pattern": "SSL"}
    decoder = initialised(Decoder(layers(kernel, **changes)), replace(MODEL, **changes), seed=1)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in decoder.blocks:
        block.run = torch.compile(block.body, fullgraph=True, backend=count)
    for second in (5, 11, 32):
        tokens_T, positions_T = torch.arange(64), torch.arange(32).repeat(2)
        decoder.logits(tokens_T, positions_T, torch.tensor([0, second, 32, 64, 64], dtype=torch.int32))
    torch._dynamo.reset()
    assert len(graphs) == 2  # one for the layers with a window, one for those without
