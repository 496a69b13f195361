"""The key map: how our logical tensors are named and laid out in Hugging Face's models, both ways from one table.

A rule pairs a logical name with the names it has there and a transform with an exact inverse. Owns names and layouts; reads
and writes no file.

Shapes: K key-value heads, R queries per key-value head, D head size, H hidden, F inner width of the MLP, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from conf.errors import UserError
from train.config.model import ModelConfig
from train.model.cost import parameter_shapes

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Transform:
    """One logical tensor to its foreign tensors and back; `join(split(x)) == x` to the bit, but for padding rows."""

    split: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
    join: Callable[[tuple[Tensor, ...], ModelConfig], Tensor]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a table; `{layer}` stands for the number of the block in all names."""

    logical: str
    foreign: tuple[str, ...]
    transform: Transform


def _cut_vocabulary(padded_VH: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    return (padded_VH[: model.vocab_size],)


def _pad_vocabulary(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    (rows_VH,) = parts
    missing = model.padded_vocab_size - rows_VH.shape[0]
    # Zeros: a padded row is never looked up and its logit is masked, so that no value of it is wrong.
    return torch.cat([rows_VH, rows_VH.new_zeros(missing, *rows_VH.shape[1:])])


def _split_groups(fused: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """[K, R + 2, D, ...] -> queries [K R D, ...], keys [K D, ...], values [K D, ...]; heads in their order."""
    rest = fused.shape[3:]
    return tuple(part.reshape(-1, *rest) for part in (fused[:, :-2], fused[:, -2], fused[:, -1]))


def _join_groups(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    query, key, value = (part.reshape(model.kv_heads, -1, model.head_dim, *part.shape[1:]) for part in parts)
    return torch.cat([query, key, value], dim=1)


def _concatenate_groups(fused: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """[K, R + 2, D] -> all queries, all keys, all values in one row [(R + 2) K D]."""
    return (torch.cat(_split_groups(fused, model)),)


def _regroup(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    (row,) = parts
    query_rows, kv_rows = model.num_heads * model.head_dim, model.kv_heads * model.head_dim
    return _join_groups(row.split([query_rows, kv_rows, kv_rows]), model)


SAME = Transform(split=lambda whole, _: (whole,), join=lambda parts, _: parts[0])
TRANSPOSED = Transform(split=lambda whole, _: (whole.T,), join=lambda parts, _: parts[0].T)
VOCABULARY = Transform(split=_cut_vocabulary, join=_pad_vocabulary)
QKV_APART = Transform(split=_split_groups, join=_join_groups)
QKV_IN_A_ROW = Transform(split=_concatenate_groups, join=_regroup)
# GPT-2's Conv1D keeps its matrix as [in, out].
QKV_CONV1D = Transform(
    split=lambda fused, model: (_concatenate_groups(fused, model)[0].T,),
    join=lambda parts, model: _regroup((parts[0].T,), model),
)
QKV_BY_HEAD = Transform(
    split=lambda fused, _: (fused.flatten(0, 2),),
    join=lambda parts, model: parts[0].unflatten(0, (model.kv_heads, -1, model.head_dim)),
)
GATE_AND_UP = Transform(split=lambda fused, _: (fused[0], fused[1]), join=lambda parts, _: torch.stack(parts))


def _pair(logical: str, foreign: str, transform: Transform = SAME) -> Rule:
    return Rule(logical=logical, foreign=(foreign,), transform=transform)


def _fan(logical: str, foreign: str, names: tuple[str, ...], transform: Transform) -> Rule:
    """A rule with several foreign names: those of `names` in the place of `*`."""
    return Rule(logical=logical, foreign=tuple(foreign.replace("*", name) for name in names), transform=transform)


_QKV, _GATE_UP = ("q", "k", "v"), ("gate", "up")

GPT2: tuple[Rule, ...] = (
    _pair("embedding.tokens.weight", "transformer.wte.weight", VOCABULARY),
    _pair("embedding.positions.weight", "transformer.wpe.weight"),
    _pair("blocks.{layer}.attention_norm.weight", "transformer.h.{layer}.ln_1.weight"),
    _pair("blocks.{layer}.attention_norm.bias", "transformer.h.{layer}.ln_1.bias"),
    _pair("blocks.{layer}.attention.qkv.weight", "transformer.h.{layer}.attn.c_attn.weight", QKV_CONV1D),
    _pair("blocks.{layer}.attention.qkv.bias", "transformer.h.{layer}.attn.c_attn.bias", QKV_IN_A_ROW),
    _pair("blocks.{layer}.attention.output.weight", "transformer.h.{layer}.attn.c_proj.weight", TRANSPOSED),
    _pair("blocks.{layer}.attention.output.bias", "transformer.h.{layer}.attn.c_proj.bias"),
    _pair("blocks.{layer}.mlp_norm.weight", "transformer.h.{layer}.ln_2.weight"),
    _pair("blocks.{layer}.mlp_norm.bias", "transformer.h.{layer}.ln_2.bias"),
    _pair("blocks.{layer}.mlp.up.weight", "transformer.h.{layer}.mlp.c_fc.weight", TRANSPOSED),
    _pair("blocks.{layer}.mlp.up.bias", "transformer.h.{layer}.mlp.c_fc.bias"),
    _pair("blocks.{layer}.mlp.down.weight", "transformer.h.{layer}.mlp.c_proj.weight", TRANSPOSED),
    _pair("blocks.{layer}.mlp.down.bias", "transformer.h.{layer}.mlp.c_proj.bias"),
    _pair("final_norm.weight", "transformer.ln_f.weight"),
    _pair("final_norm.bias", "transformer.ln_f.bias"),
    _pair("head.weight", "lm_head.weight", VOCABULARY),
)

# What Llama's descendants have in common: all but the norms.
_DECODER: tuple[Rule, ...] = (
    _pair("embedding.tokens.weight", "model.embed_tokens.weight", VOCABULARY),
    _fan("blocks.{layer}.attention.qkv.weight", "model.layers.{layer}.self_attn.*_proj.weight", _QKV, QKV_APART),
    _fan("blocks.{layer}.attention.qkv.bias", "model.layers.{layer}.self_attn.*_proj.bias", _QKV, QKV_APART),
    _pair("blocks.{layer}.attention.output.weight", "model.layers.{layer}.self_attn.o_proj.weight"),
    _pair("blocks.{layer}.attention.output.bias", "model.layers.{layer}.self_attn.o_proj.bias"),
    _fan("blocks.{layer}.mlp.gate_up.weight", "model.layers.{layer}.mlp.*_proj.weight", _GATE_UP, GATE_AND_UP),
    _fan("blocks.{layer}.mlp.gate_up.bias", "model.layers.{layer}.mlp.*_proj.bias", _GATE_UP, GATE_AND_UP),
    _pair("blocks.{layer}.mlp.down.weight", "model.layers.{layer}.mlp.down_proj.weight"),
    _pair("blocks.{layer}.mlp.down.bias", "model.layers.{layer}.mlp.down_proj.bias"),
    _pair("final_norm.weight", "model.norm.weight"),
    _pair("head.weight", "lm_head.weight", VOCABULARY),
)
_PRE_NORMS: tuple[Rule, ...] = (
    _pair("blocks.{layer}.attention_norm.weight", "model.layers.{layer}.input_layernorm.weight"),
    _pair("blocks.{layer}.mlp_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
)
_POST_NORMS: tuple[Rule, ...] = (
    _pair("blocks.{layer}.attention_post_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
    _pair("blocks.{layer}.mlp_post_norm.weight", "model.layers.{layer}.post_feedforward_layernorm.weight"),
)
_QK_NORMS: tuple[Rule, ...] = (
    _pair("blocks.{layer}.attention.query_norm.weight", "model.layers.{layer}.self_attn.q_norm.weight"),
    _pair("blocks.{layer}.attention.key_norm.weight", "model.layers.{layer}.self_attn.k_norm.weight"),
)
LLAMA: tuple[Rule, ...] = _DECODER + _PRE_NORMS
GEMMA2: tuple[Rule, ...] = (
    *_DECODER,
    *_POST_NORMS,
    _pair("blocks.{layer}.attention_norm.weight", "model.layers.{layer}.input_layernorm.weight"),
    _pair("blocks.{layer}.mlp_norm.weight", "model.layers.{layer}.pre_feedforward_layernorm.weight"),
)
STABLELM: tuple[Rule, ...] = (
    *LLAMA,
    _pair("blocks.{layer}.attention_norm.bias", "model.layers.{layer}.input_layernorm.bias"),
    _pair("blocks.{layer}.mlp_norm.bias", "model.layers.{layer}.post_attention_layernorm.bias"),
    _pair("final_norm.bias", "model.norm.bias"),
)
GPT_NEOX: tuple[Rule, ...] = (
    _pair("embedding.tokens.weight", "gpt_neox.embed_in.weight", VOCABULARY),
    _pair("blocks.{layer}.attention_norm.weight", "gpt_neox.layers.{layer}.input_layernorm.weight"),
    _pair("blocks.{layer}.attention_norm.bias", "gpt_neox.layers.{layer}.input_layernorm.bias"),
    _pair("blocks.{layer}.attention.qkv.weight", "gpt_neox.layers.{layer}.attention.query_key_value.weight", QKV_BY_HEAD),
    _pair("blocks.{layer}.attention.qkv.bias", "gpt_neox.layers.{layer}.attention.query_key_value.bias", QKV_BY_HEAD),
    _pair("blocks.{layer}.attention.output.weight", "gpt_neox.layers.{layer}.attention.dense.weight"),
    _pair("blocks.{layer}.attention.output.bias", "gpt_neox.layers.{layer}.attention.dense.bias"),
    _pair("blocks.{layer}.mlp_norm.weight", "gpt_neox.layers.{layer}.post_attention_layernorm.weight"),
    _pair("blocks.{layer}.mlp_norm.bias", "gpt_neox.layers.{layer}.post_attention_layernorm.bias"),
    _pair("blocks.{layer}.mlp.up.weight", "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight"),
    _pair("blocks.{layer}.mlp.up.bias", "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.bias"),
    _pair("blocks.{layer}.mlp.down.weight", "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight"),
    _pair("blocks.{layer}.mlp.down.bias", "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.bias"),
    _pair("final_norm.weight", "gpt_neox.final_layer_norm.weight"),
    _pair("final_norm.bias", "gpt_neox.final_layer_norm.bias"),
    # The published name; transformers 5 calls it lm_head and reads both.
    _pair("head.weight", "embed_out.weight", VOCABULARY),
)

TABLES: dict[str, tuple[Rule, ...]] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA + _QK_NORMS,
    "gemma2": GEMMA2,
    "gemma3": GEMMA2 + _QK_NORMS,
    "gpt_neox": GPT_NEOX,
    "stablelm": STABLELM,
    "exaone4": _DECODER + _POST_NORMS + _QK_NORMS,
    "custom": (),
}


class KeyMap:
    """A family's table written out for one model: every logical tensor used once, every foreign key produced once.

    Raises UserError when the family has no place for a tensor of the model.
    """

    def __init__(self, model: ModelConfig, table: tuple[Rule, ...] | None = None) -> None:
        self.model = model
        self.logical_shapes: dict[str, Shape] = parameter_shapes(model)
        self._rules: dict[str, Rule] = {}
        self.foreign_shapes: dict[str, Shape] = {}
        """Foreign name -> shape, in the order of the logical tensors."""
        by_pattern = _by_pattern(TABLES[model.family] if table is None else table)
        homeless = []
        for name, shape in self.logical_shapes.items():
            number = re.match(r"blocks\.(\d+)\.", name)
            rule = by_pattern.get(name.replace(number[0], "blocks.{layer}.") if number else name)
            if rule is None:
                homeless.append(name)
                continue
            foreign = tuple(key.format(layer=number[1] if number else "") for key in rule.foreign)
            self._rules[name] = Rule(logical=name, foreign=foreign, transform=rule.transform)
            for key, part in zip(foreign, rule.transform.split(torch.empty(shape, device="meta"), model), strict=True):
                assert key not in self.foreign_shapes, f"two logical tensors become {key}"
                self.foreign_shapes[key] = tuple(part.shape)
        if homeless:
            raise UserError(
                f"model.family={model.family}: has no place for {_few(homeless)}; "
                "only a model whose fields fit one of the other families can be exported"
            )

    def foreign_names(self, logical_name: str) -> tuple[str, ...]:
        """The names that a logical tensor has in the foreign format."""
        return self._rules[logical_name].foreign

    def to_foreign(self, logical_name: str, whole: Tensor) -> dict[str, Tensor]:
        """The foreign tensors that `whole`, of the logical shape, becomes; views where that is possible."""
        rule = self._rules[logical_name]
        shape = self.logical_shapes[logical_name]
        if tuple(whole.shape) != shape:
            raise UserError(f"{logical_name}: has shape {list(whole.shape)}, the model's is {list(shape)}")
        return dict(zip(rule.foreign, rule.transform.split(whole, self.model), strict=True))

    def to_logical(self, logical_name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The logical tensor, made from the foreign ones that `read` gives by name.

        Raises UserError for a foreign tensor of another shape than the model's.
        """
        rule = self._rules[logical_name]
        parts = tuple(read(key) for key in rule.foreign)
        for key, part in zip(rule.foreign, parts, strict=True):
            if tuple(part.shape) != self.foreign_shapes[key]:
                raise UserError(f"{key}: has shape {list(part.shape)}, expected {list(self.foreign_shapes[key])}")
        return rule.transform.join(parts, self.model)

    def check_logical(self, shapes: Mapping[str, Shape]) -> None:
        """Raise UserError unless `shapes` (of a checkpoint) are exactly the logical tensors of the model."""
        _check("checkpoint", shapes, self.logical_shapes)

    def check_foreign(self, shapes: Mapping[str, Shape]) -> None:
        """Raise UserError unless `shapes` (of weight files) are exactly the foreign tensors of the model."""
        _check("weight files", shapes, self.foreign_shapes)


def _by_pattern(table: tuple[Rule, ...]) -> dict[str, Rule]:
    by_pattern = {rule.logical: rule for rule in table}
    assert len(by_pattern) == len(table), "a logical name occurs twice in a table"
    return by_pattern


def _check(holder: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"lacks {_few(missing)}")
    if unknown := [name for name in found if name not in expected]:
        problems.append(f"holds unknown {_few(unknown)}")
    for name in expected.keys() & found.keys():
        if tuple(found[name]) != tuple(expected[name]):
            problems.append(f"{name} has shape {list(found[name])}, expected {list(expected[name])}")
    if problems:
        raise UserError(f"the {holder} and the model's configuration differ: " + "; ".join(sorted(problems)))


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
