"""What a model family can hold: the values that its published class takes for the fields of a model.

A configuration is checked against the table of its family when it is made; `train.convert` writes the families' files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isclose, sqrt
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from conf.schema import shown

if TYPE_CHECKING:  # it imports this module
    from train.config.model import ModelConfig

FamilyName: TypeAlias = Literal[
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "stablelm",
    "exaone4",
    "custom",
]
# The values that a field may have; or how the only one follows from the model's other fields.
Choice: TypeAlias = "tuple[Any, ...] | Callable[[ModelConfig], Any]"
Table: TypeAlias = Mapping[str, Choice]
ANY: tuple[Any, ...] = ()

_PLAIN: Table = {
    "positions": ("rotary",),
    "rope.fraction": (1.0,),
    "local_rope": (None,),
    "norm": ("rms",),
    "norm_placement": ("pre",),
    "norm_one_plus": (False,),
    "residual": ("sequential",),
    "mlp": ("swiglu",),
    "bias": (False,),
    "qkv_bias": lambda model: model.bias,
    "attention_output_bias": lambda model: model.bias,
    "qk_norm": (False,),
    "qk_norm_across_heads": (False,),
    "embedding_scale": (1.0,),
    "logit_softcap": (None,),
    "window": (None,),
    "window_pattern": ("S",),
    "attention_scale": lambda model: model.head_dim**-0.5,
    "attention_softcap": (None,),
}
_DIVIDED_HIDDEN: Table = {"head_size": lambda model: model.hidden_size // model.num_heads}
_ALL_KEYS: Table = _DIVIDED_HIDDEN | {"num_kv_heads": lambda model: model.num_heads}
_DIVIDING_HEADS: Table = {
    "num_heads": lambda model: max(n for n in range(1, model.num_heads + 1) if model.hidden_size % n == 0),
}
# One switch for all biases of attention.
_ATTENTION_BIASES: Table = {"qkv_bias": ANY, "attention_output_bias": lambda model: model.has_qkv_bias}
_GEMMA: Table = (
    _DIVIDING_HEADS
    | _ATTENTION_BIASES
    | {"norm_one_plus": (True,), "mlp": ("geglu",), "embedding_scale": lambda model: sqrt(model.hidden_size)}
)
_GEMMA2: Table = _GEMMA | {
    "norm_placement": ("both",),
    "window": lambda model: model.window or model.max_positions,
    # The file has the inverse square of the scale, as a whole number.
    "attention_scale": lambda model: 1 / sqrt(max(1, round(model.score_scale**-2))),
    "attention_softcap": ANY,
    "logit_softcap": ANY,
}

FAMILIES: dict[str, Table] = {
    "gpt2": _PLAIN
    | _ALL_KEYS
    | {
        "positions": ("learned",),
        "norm": ("layer",),
        "mlp": ("gelu", "gelu_exact"),
        "bias": (True,),
        "attention_scale": lambda model: 1.0 if model.score_scale == 1.0 else model.head_dim**-0.5,
    },
    "gpt_neox": _PLAIN
    | _ALL_KEYS
    | _ATTENTION_BIASES
    | {
        "rope.fraction": ANY,
        "norm": ("layer",),
        "residual": ("sequential", "parallel"),
        "mlp": ("gelu_exact", "gelu"),
        "bias": (True,),
    },
    "llama": _PLAIN | _DIVIDING_HEADS | _ATTENTION_BIASES | {"bias": ANY},
    "mistral": _PLAIN | {"window": ANY},
    "qwen2": _PLAIN | _DIVIDED_HIDDEN | {"qkv_bias": (True,), "window": ANY, "window_pattern": ANY},
    "qwen3": _PLAIN | _ATTENTION_BIASES | {"qk_norm": (True,), "window": ANY, "window_pattern": ANY},
    "gemma": _PLAIN | _GEMMA,
    "gemma2": _PLAIN | _GEMMA2 | {"window_pattern": ("SL",)},
    "gemma3": _PLAIN
    | _GEMMA2
    | {
        "qk_norm": (True,),
        "attention_softcap": (None,),
        "window_pattern": lambda model: "S" * max(1, len(model.window_pattern) - 1) + "L",
        "local_rope": ANY,
        "local_rope.fraction": (1.0,),
        "local_rope.scaling": ("none",),
    },
    "phi3": _PLAIN
    | _DIVIDED_HIDDEN
    | {"rope.fraction": ANY, "rope.scaling": ("none", "longrope"), "window": ANY}
    # Older releases take no other factor than that of the lengths.
    | {
        "rope.attention_factor": (None,),
        "rope.factor": lambda model: (
            model.max_positions / model.rope.original_max_positions if model.rope.scaling == "longrope" else model.rope.factor
        ),
    },
    "olmo2": _PLAIN
    | _DIVIDED_HIDDEN
    | _ATTENTION_BIASES
    | {"norm_placement": ("post",), "qk_norm": (True,), "qk_norm_across_heads": (True,)},
    "stablelm": _PLAIN
    | _DIVIDED_HIDDEN
    | {"rope.fraction": ANY, "norm": ("layer",), "residual": ("sequential", "parallel_shared"), "qkv_bias": ANY},
    "exaone4": _PLAIN | _DIVIDED_HIDDEN | {"norm_placement": ("post",), "qk_norm": (True,)},
    "custom": {},
}
# Fields whose null stands for another value.
_RESOLVED: dict[str, Callable[[ModelConfig], Any]] = {
    "num_kv_heads": attrgetter("kv_heads"),
    "head_size": attrgetter("head_dim"),
    "qkv_bias": attrgetter("has_qkv_bias"),
    "attention_output_bias": attrgetter("has_attention_output_bias"),
    "attention_scale": attrgetter("score_scale"),
    "local_rope.fraction": lambda model: (model.local_rope or model.rope).fraction,
    "local_rope.scaling": lambda model: (model.local_rope or model.rope).scaling,
}


def family_problems(model: ModelConfig) -> list[str]:
    """The fields of a model that its family cannot hold."""
    problems = []
    for name, choice in FAMILIES[model.family].items():
        value = _RESOLVED.get(name, attrgetter(name))(model)
        choices = (choice(model),) if callable(choice) else choice
        if choices and not any(_same(value, other) for other in choices):
            problems.append(
                f"{name}={shown(value)}: family={model.family} has {' or '.join(map(shown, choices))}; take that, or "
                f"family=custom, which trains and generates but has no export"
            )
    return problems


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return isclose(value, other, rel_tol=1e-6)
    return value == other
