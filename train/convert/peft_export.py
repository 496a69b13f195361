"""The adapters of a checkpoint as a folder of PEFT, to be loaded beside the base in transformers, vLLM and the like.

Where a foreign matrix holds one projection, its adapter is ours for that projection. Where it holds several (GPT-2's
`c_attn`, Phi-3's `qkv_proj`), it has one adapter there of so many times the rank: the first matrices one above the other,
of the second ones each in the rows of its projection. That is the same product, exactly.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. Shapes: I in, O out, R rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from conf.errors import UserError
from train.checkpoint.reader import CheckpointReader
from train.config.adapter import LoraConfig
from train.convert.keymap import KeyMap
from train.model.adapters import MAGNITUDE, NEW_HEAD, WEIGHT, A, B, projections_of

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class ForeignAdapter:
    """The adapter of one foreign module; all fp32."""

    first_RI: Tensor
    second_OR: Tensor
    lengths_O: Tensor | None
    transposed: bool
    """The module keeps its weight as [I, O]."""

    @property
    def rank(self) -> int:
        """Rows of the first matrix."""
        return self.first_RI.shape[0]


def write_adapter(reader: CheckpointReader, folder: Path, *, base_model: str) -> None:
    """Fill `folder` with all that `PeftModel.from_pretrained` reads. `base_model`: folder, or name on the hub, of the base.

    A head that the run has trained besides is written with them. Raises UserError when the checkpoint has no adapters, or
    the family has no place for them.
    """
    lora = check_adapted(reader)
    adapters = foreign_adapters(reader)
    heads = [name for name in reader.names if name.startswith(NEW_HEAD)]
    tensors = {f"{PREFIX}{name}": reader.read(name).contiguous() for name in heads}
    for module, adapter in adapters.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = adapter.first_RI.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = adapter.second_OR.contiguous()
        if adapter.lengths_O is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = adapter.lengths_O.contiguous()
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{bad[0]}: holds values that are not finite; export an earlier checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings = peft_settings(lora, adapters, KeyMap(reader.model), heads=heads, base_model=base_model)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def check_adapted(reader: CheckpointReader) -> LoraConfig:
    """The settings of its adapters. Raises UserError when the checkpoint has none."""
    if reader.adapter is None:
        raise UserError(f"{reader.path}: has no adapters, its run trained the weights themselves; export the model instead")
    return reader.adapter


def foreign_adapters(reader: CheckpointReader) -> dict[str, ForeignAdapter]:
    """Foreign module -> its adapter, in layer order."""
    keymap = KeyMap(reader.model)
    found: dict[str, ForeignAdapter] = {}
    for name in reader.adapter_names:
        if name.endswith(A):
            found |= _of_layer(name.removesuffix(A), reader, keymap)
    return found


def _of_layer(layer: str, reader: CheckpointReader, keymap: KeyMap) -> dict[str, ForeignAdapter]:
    first, second = reader.read(f"{layer}{A}"), reader.read(f"{layer}{B}")
    projections = projections_of(layer, tuple(second.shape[:-1]))
    firsts = first.unbind() if projections.count > 1 else (first,)
    modules = [name.removesuffix(WEIGHT) for name in keymap.foreign_names(f"{layer}{WEIGHT}")]
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {module: [] for module in modules}
    begin = 0
    for first_RI, rows in zip(firsts, projections.sections, strict=True):
        alone, mark = torch.zeros_like(second), torch.zeros(*second.shape[:-1], 1)
        alone.narrow(projections.axis, begin, rows).copy_(second.narrow(projections.axis, begin, rows))
        mark.narrow(projections.axis, begin, rows).fill_(1)
        begin += rows
        pairs = zip(modules, _split(layer, alone, keymap), _split(layer, mark, keymap), strict=True)
        for module, second_OR, mark_O1 in pairs:
            if mark_O1.any():
                parts[module].append((first_RI, second_OR))
    stretched: list[Tensor] | list[None] = [None] * len(modules)
    if reader.adapter.dora:
        lengths = reader.read(f"{layer}{MAGNITUDE}").unsqueeze(-1)
        stretched = [length_O1.flatten() for length_O1 in _split(layer, lengths, keymap)]
    return {
        module: ForeignAdapter(
            first_RI=torch.cat([first_RI for first_RI, _ in parts[module]]),
            second_OR=torch.cat([second_OR for _, second_OR in parts[module]], dim=1),
            lengths_O=lengths_O,
            transposed=_is_transposed(layer, second, keymap),
        )
        for module, lengths_O in zip(modules, stretched, strict=True)
    }


def _split(layer: str, rows: Tensor, keymap: KeyMap) -> list[Tensor]:
    """Something of every row of a layer's weight, [... out axes, X], as [O, X] of each of its foreign matrices."""
    parts = keymap.transform(f"{layer}{WEIGHT}").split(rows, keymap.model)
    return [part.T if _is_transposed(layer, rows, keymap) else part for part in parts]


def _is_transposed(layer: str, rows: Tensor, keymap: KeyMap) -> bool:
    """Whether the foreign matrix has its rows in columns: told by what becomes of an axis that is longer than all others."""
    long = 1 + rows[..., 0].numel()
    parts = keymap.transform(f"{layer}{WEIGHT}").split(torch.empty(*rows.shape[:-1], long, device="meta"), keymap.model)
    return parts[0].shape[0] == long


def peft_settings(
    lora: LoraConfig, adapters: dict[str, ForeignAdapter], keymap: KeyMap, *, heads: list[str], base_model: str
) -> dict:
    """The content of adapter_config.json."""
    ranks, alphas = {}, {}
    for module, adapter in adapters.items():
        if adapter.rank != lora.rank:
            times = adapter.rank // lora.rank
            ranks[module] = adapter.rank
            alphas[module] = lora.alpha * (times**0.5 if lora.rslora else times)  # the scaling stays
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if keymap.model.labels else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": any(adapter.transposed for adapter in adapters.values()),
        "target_modules": short_names(list(adapters), keymap),
        "modules_to_save": [name.removesuffix(WEIGHT) for name in heads] or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "inference_mode": True,
    }


def short_names(modules: list[str], keymap: KeyMap) -> list[str]:
    """The last words of the modules where these say enough, as most readers of the format expect; else whole names."""
    linear = {name.removesuffix(WEIGHT) for name, shape in keymap.foreign_shapes.items() if len(shape) > 1}
    last = {name.rpartition(".")[2] for name in modules}
    meant = {name for name in linear if name.rpartition(".")[2] in last}
    return sorted(last) if meant == set(modules) else sorted(modules)
