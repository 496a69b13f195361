"""Sizes of a model: its parameters and what they take in bytes. Torch-free, so that a login node can print it.

Source: Rajbhandari et al. 2020 for ZeRO.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from train.config.kernels import KernelsConfig
from train.config.model import ModelConfig

GIB = 1024**3
BLOCK_MATRIX = re.compile(r"blocks\.\d+\.(attention\.(qkv|output)|mlp\.(gate_up|up|down))\.weight")
EMBEDDING, OUTPUT_HEAD, LABEL_HEAD = "embedding.tokens.weight", "head.weight", "score.weight"
"""Logical names of the embedding, which is the head of a language model that ties them, of the matrix behind the final norm
where it does not, and of that of a model that tells labels apart."""
_WHOLE = (
    "norm.weight", "norm.bias", "positions.weight", "attention.output.bias", "mlp.down.bias", LABEL_HEAD,
    "qkv.lora_a.weight", "up.lora_a.weight", "output.lora_b.weight", "down.lora_b.weight",
    "output.lora_magnitude.weight", "down.lora_magnitude.weight",
)  # fmt: skip
"""How the names of tensors end that every tensor-parallel rank holds whole."""


def is_block_matrix(name: str) -> bool:
    """Whether a logical name is that of a matrix inside a block: what grows with the width squared."""
    return BLOCK_MATRIX.fullmatch(name) is not None


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Logical name -> logical shape of every parameter, in layer order: last the head, where it has a matrix of its own.

    Fused matrices keep the axis along which tensor-parallel ranks cut: query-key-value is
    [kv heads, queries per kv head + 2, head size, hidden], gate and up are [2, ffn, hidden].
    """
    hidden, ffn, head = model.hidden_size, model.ffn_size, model.head_dim
    per_kv = model.num_heads // model.kv_heads + 2
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.padded_vocab_size, hidden)}
    if model.positions == "learned":
        shapes["embedding.positions.weight"] = (model.max_positions, hidden)

    def norm(name: str, present: bool = True) -> None:
        if not present:
            return
        shapes[f"{name}.weight"] = (hidden,)
        if model.norm == "layer":
            shapes[f"{name}.bias"] = (hidden,)

    def linear(name: str, out: tuple[int, ...], inner: int, *, bias: bool = model.bias) -> None:
        shapes[f"{name}.weight"] = (*out, inner)
        if bias:
            shapes[f"{name}.bias"] = out

    before, after = model.norm_placement != "post", model.norm_placement != "pre"
    for number in range(model.num_layers):
        block = f"blocks.{number}"
        norm(f"{block}.attention_norm", before)
        linear(f"{block}.attention.qkv", (model.kv_heads, per_kv, head), hidden, bias=model.has_qkv_bias)
        if model.qk_norm:
            heads = {"query": model.num_heads, "key": model.kv_heads}
            widths = {kind: head * (count if model.qk_norm_across_heads else 1) for kind, count in heads.items()}
            shapes |= {f"{block}.attention.{kind}_norm.weight": (width,) for kind, width in widths.items()}
        linear(f"{block}.attention.output", (hidden,), model.num_heads * head, bias=model.has_attention_output_bias)
        norm(f"{block}.attention_post_norm", after)
        norm(f"{block}.mlp_norm", before and model.residual != "parallel_shared")
        if model.gated_mlp:
            linear(f"{block}.mlp.gate_up", (2, ffn), hidden)
        else:
            linear(f"{block}.mlp.up", (ffn,), hidden)
        linear(f"{block}.mlp.down", (hidden,), ffn)
        norm(f"{block}.mlp_post_norm", after)
    norm("final_norm")
    if model.labels or not model.tied_head:
        shapes[LABEL_HEAD if model.labels else OUTPUT_HEAD] = (head_width(model), hidden)
    return shapes


def head_width(model: ModelConfig) -> int:
    """Numbers that the head gives for a position: one for each label, or for each row of the embedding."""
    return len(model.labels) or model.padded_vocab_size


def body_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """`parameter_shapes` without the head: what a model with labels takes over from one without, or with others."""
    return {name: shape for name, shape in parameter_shapes(model).items() if name not in (OUTPUT_HEAD, LABEL_HEAD)}


def num_parameters(model: ModelConfig) -> int:
    """Number of parameters, embedding and padding rows included; adapters are none of the model's."""
    return num_values(parameter_shapes(model))


def num_values(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers in the tensors of these shapes."""
    return sum(prod(shape) for shape in shapes.values())


def parameters_per_rank(model: ModelConfig, tensor_parallel: int) -> int:
    """Number of parameters that one of `tensor_parallel` ranks holds: norms, positions, reduced biases, labels' head whole.

    Of norms across heads each rank has what belongs to its heads.
    """
    return _values_per_rank(model, parameter_shapes(model), tensor_parallel)


def _values_per_rank(model: ModelConfig, shapes: Mapping[str, tuple[int, ...]], tensor_parallel: int) -> int:
    """Numbers that one rank holds of tensors with these logical names and shapes, which may be adapters."""
    cut = ("query_norm.weight", "key_norm.weight") if model.qk_norm_across_heads else ()
    return sum(
        prod(shape) if name.endswith(_WHOLE) and not name.endswith(cut) else prod(shape) // tensor_parallel
        for name, shape in shapes.items()
    )


def _logits_bytes(model: ModelConfig, tokens: int, tensor_parallel: int, limit: int) -> int:
    """Bytes of fp32 logits that exist together on a rank."""
    if model.labels:  # every rank has those of all labels
        return 4 * tokens * len(model.labels)
    return min(limit, 4 * tokens * model.padded_vocab_size // tensor_parallel)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank; activations are an estimate for kernels that hold no S x S matrix."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of all parts, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What of a model trains, and how."""

    shapes: Mapping[str, tuple[int, ...]]
    """Logical name -> logical shape, adapters among them."""
    muon: bool = False


def memory_per_rank(
    model: ModelConfig,
    *,
    micro_tokens: int,
    data_parallel: int,
    tensor_parallel: int,
    zero: int,
    bytes_per_value: int,
    kernels: KernelsConfig,
    trained: Trained | None = None,
) -> MemoryEstimate:
    """Estimate the bytes that one rank holds, for `micro_tokens` tokens at a time.

    bf16 keeps fp32 gradient accumulators, fp32 master weights and both moments; fp32 the same without a bf16 copy. Muon has
    one moment of the blocks' matrices. `trained` None: all, by AdamW.
    """
    if trained is None:
        trained = Trained(shapes=parameter_shapes(model))
    parameters = _values_per_rank(model, {**parameter_shapes(model), **trained.shapes}, tensor_parallel)
    learned = _values_per_rank(model, trained.shapes, tensor_parallel)
    shard = -(-learned // data_parallel)
    queries = model.num_heads * model.head_dim
    fused = queries + 2 * model.kv_heads * model.head_dim
    mlp = model.ffn_size * (2 if model.gated_mlp else 1)
    # Norms and the residual stream: each norm its input and its output. Then what the split layers make: query-key-value,
    # attention's output, the MLP's first product and what its activation makes of it.
    norms = {"pre": 2, "post": 2, "both": 4}[model.norm_placement]
    whole = (2 + 2 * norms) * model.hidden_size + (fused + queries + 2 * mlp) // tensor_parallel
    kept = {
        "none": whole,
        # A block's input and the results of its products and of attention.
        "selective": 3 * model.hidden_size + (fused + queries + mlp) // tensor_parallel,
        "full": model.hidden_size,
    }[kernels.recompute]
    again = 0 if kernels.recompute == "none" else whole  # the block whose backward pass runs
    activations = micro_tokens * bytes_per_value * (model.num_layers * kept + again + 2 * model.hidden_size)
    saved = 4 * sum(prod(shape) for name, shape in trained.shapes.items() if trained.muon and is_block_matrix(name))
    return MemoryEstimate(
        weights=bytes_per_value * (-(-parameters // data_parallel) if zero == 3 else parameters),
        gradients=4 * (shard if zero >= 2 else learned),
        optimizer=12 * shard - saved // data_parallel,
        activations=activations,
        logits=_logits_bytes(model, micro_tokens, tensor_parallel, kernels.logits_bytes) * (8 + bytes_per_value) // 4,
    )
