"""Their side: the model that transformers makes of a folder, its weights read when a module runs and dropped after.

transformers itself finds the files, names and renames the keys, checks the shapes and ties the weights; only the reading of
values is put off. So what runs is the model that `from_pretrained` gives.

Shapes: B sequences, S positions, T = B x S, C positions of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, modeling_utils
from transformers.modeling_outputs import ModelOutput

from train.config.model import ModelConfig
from train.convert.proof.finding import Finding
from train.convert.proof.rows import Rows, logits_at_once
from train.convert.proof.stored import PromisingFile, read_foreign
from train.convert.weights import WeightFormat
from train.model.heads import IGNORE

Watch = Callable[[str, Tensor], None]
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What transformers raises for a folder that it cannot make a model of."""


class TheirModel:
    """A model of transformers in fp32 whose parameters lie on meta between their uses."""

    def __init__(self, module: PreTrainedModel, model: ModelConfig) -> None:
        self.module, self.model = module.eval(), model
        self._lasting = False
        self._output_type: type[ModelOutput] | None = None  # of the base model; known once it has run
        self._loaded: list[tuple[nn.Module, str, nn.Parameter]] = []
        for part in module.modules():
            if part._parameters:
                part.register_forward_pre_hook(self._load)
                part.register_forward_hook(self._drop)

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied one once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @torch.inference_mode()
    def hidden(self, rows: Rows, watch: Watch | None = None) -> Tensor:
        """[T, H], ready for the head; `watch` is given the hidden states [T, H] after each part, by our layers' names."""
        hooks = [] if watch is None else self._watch_blocks(watch)
        try:
            inputs = {"input_ids": rows.tokens, "position_ids": rows.positions, "use_cache": False}
            output = self.module.base_model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        self._output_type = type(output)
        last_TH = output.last_hidden_state.flatten(0, 1)
        assert not last_TH.is_meta, "a weight was used that no hook had loaded"
        if watch is not None:
            watch("final_norm", last_TH)
        return last_TH

    @torch.inference_mode()
    def logits(self, hidden_TH: Tensor) -> Iterator[Tensor]:
        """[C, V or labels] of some positions after the others: all that the class does behind its base model."""
        with self._weights_last(), self._any_id_ends_a_row():
            for hidden_CH in hidden_TH.split(logits_at_once(self.model)):
                # A class that tells labels apart does so at the last position of a row.
                hidden_BSH = hidden_CH[:, None] if self.model.labels else hidden_CH[None]
                with self._base_model_gives(hidden_BSH):
                    ids_BS = torch.zeros(hidden_BSH.shape[:2], dtype=torch.int64)
                    yield self.module(input_ids=ids_BS, use_cache=False).logits.flatten(0, -2)

    @torch.inference_mode()
    def label_logits(self, tokens_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """[B, labels] of rows with padding behind them, by the class as its users call it."""
        mask_BS = torch.arange(tokens_BS.shape[1]) < lengths_B[:, None]
        return self.module(input_ids=tokens_BS, attention_mask=mask_BS.long(), use_cache=False).logits

    def loss(self, rows: Rows) -> float:
        """Sum of the losses of all targets."""
        labels = rows.labels.flatten()
        wanted = labels != IGNORE
        chunks = self.logits(self.hidden(rows)[wanted])
        pairs = zip(chunks, labels[wanted].split(logits_at_once(self.model)), strict=True)
        return sum(F.cross_entropy(logits_CV.float(), labels_C, reduction="sum").item() for logits_CV, labels_C in pairs)

    @torch.inference_mode()
    def continue_greedily(self, prompts_BS: Tensor, new_tokens: int) -> Iterator[Tensor]:
        """Yield the likeliest next id [B] of each prompt, `new_tokens` times, over the key-value cache."""
        fresh_BS, cache = prompts_BS, None
        for _ in range(new_tokens):
            answer = self.module(input_ids=fresh_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids_B = answer.past_key_values, answer.logits[:, -1].argmax(dim=1)
            yield ids_B
            fresh_BS = ids_B[:, None]

    def _load(self, part: nn.Module, _: Any) -> None:
        for name, parameter in part._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            promise = parameter.promise  # type: ignore[attr-defined]
            values = read_foreign(promise.path, promise.key, dtype=parameter.dtype)
            part._parameters[name] = nn.Parameter(values, requires_grad=False)
            self._loaded.append((part, name, parameter))

    def _drop(self, *_: Any) -> None:
        while self._loaded and not self._lasting:
            part, name, parameter = self._loaded.pop()
            part._parameters[name] = parameter

    @contextmanager
    def _weights_last(self) -> Iterator[None]:
        self._lasting = True
        try:
            yield
        finally:
            self._lasting = False
            self._drop()

    @contextmanager
    def _any_id_ends_a_row(self) -> Iterator[None]:
        """While it lasts, no id is padding: classes that tell labels apart refuse several rows without such an id."""
        config = self.module.config
        real = config.pad_token_id
        config.pad_token_id = -1
        try:
            yield
        finally:
            config.pad_token_id = real

    @contextmanager
    def _base_model_gives(self, hidden_BSH: Tensor) -> Iterator[None]:
        base = self.module.base_model
        base.forward = lambda *_, **__: self._output_type(last_hidden_state=hidden_BSH)
        try:
            yield
        finally:
            del base.forward

    def _watch_blocks(self, watch: Watch) -> list[Any]:
        lists = [part for part in self.module.base_model.modules() if isinstance(part, nn.ModuleList)]
        (blocks,) = [part for part in lists if len(part) == self.model.num_layers][:1]

        def before(_: nn.Module, positional: tuple, named: dict[str, Any]) -> None:
            watch("embedding", (positional[0] if positional else named["hidden_states"]).flatten(0, 1))

        def after(number: int) -> Callable[[nn.Module, Any, Any], None]:
            def tell(_: nn.Module, __: Any, output: Any) -> None:
                watch(f"blocks.{number}", (output[0] if isinstance(output, tuple) else output).flatten(0, 1))

            return tell

        hooks = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
        return hooks + [block.register_forward_hook(after(number)) for number, block in enumerate(blocks)]


def open_theirs(folder: Path, model: ModelConfig, format: WeightFormat = "safetensors") -> tuple[TheirModel | None, Finding]:
    """The folder's model as transformers reads it; none when the keys or shapes are not exactly the class's.

    A model of pickled weights is held whole: its files cannot be read in parts.
    """
    try:
        with _values_put_off() if format == "safetensors" else nullcontext():
            module, info = (AutoModelForSequenceClassification if model.labels else AutoModelForCausalLM).from_pretrained(
                folder,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=format == "safetensors",
            )
    except UNREADABLE as error:
        return None, Finding(name="keys", problems=(f"transformers cannot read the folder: {error}",))
    problems = [
        f"{kind}: {sorted(str(key) for key in info[kind])[:5]}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")
        if info.get(kind)
    ]
    if not problems:
        unknown = [
            name for name, value in module.named_parameters() if not hasattr(value, "promise") and format == "safetensors"
        ]
        problems += [f"transformers makes {unknown[:5]} of several tensors, which the proof cannot follow"] if unknown else []
    count = sum(parameter.numel() for parameter in module.parameters())
    finding = Finding(name="keys", figures={"parameters": count, "class": type(module).__name__}, problems=tuple(problems))
    return (None if problems else TheirModel(module, model)), finding


@contextmanager
def _values_put_off() -> Iterator[None]:
    """While it lasts, transformers finds promises in weight files, in the place of values.

    Its own way, a device map with `disk`, goes through accelerate; it leaves shapes unchecked, and keeps all files mapped
    while it reads every value once.
    """
    real = modeling_utils.safe_open
    modeling_utils.safe_open = PromisingFile
    try:
        yield
    finally:
        modeling_utils.safe_open = real
