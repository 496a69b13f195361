"""Rotary settings in old words and new ones.

transformers 5 reads rope_parameters alone; older releases, and other readers, rope_theta and rope_scaling, and take a base of
10000 without a word where they find none. Both are written, and say the same. What is read is the new form, which
transformers makes of either.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

from conf.errors import ConfigError, UserError
from conf.schema import shown
from train.config.model import RopeConfig
from train.convert.families.family import Json

_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_max_positions",
}
_YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "beta_fast": "fast_turns",
    "beta_slow": "slow_turns",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
}
_LONGROPE = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
    "attention_factor": "attention_factor",
}
# Kind of scaling -> its words there and here.
WORDS: dict[str, Mapping[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": _LLAMA3,
    "yarn": _YARN,
    "longrope": _LONGROPE,
}
_SHARED = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
_DERIVED = {"yarn": {"mscale", "mscale_all_dim"}}  # what attention_factor is worked out from where it is not given


def rope_fields(rope: RopeConfig) -> Json:
    """Fields of config.json, in both forms."""
    scaling = rope_scaling(rope)
    fraction = {} if rope.fraction == 1 else {"partial_rotary_factor": rope.fraction}
    # Releases before 5 look for the first length of longrope here alone, and take the ratio of both for its factor.
    first = {"original_max_position_embeddings": rope.original_max_positions} if rope.scaling == "longrope" else {}
    return {
        "rope_parameters": {"rope_type": "default", **(scaling or {}), **fraction, "rope_theta": rope.base},
        "rope_theta": rope.base,
        "rope_scaling": scaling,
        **first,
    }


def rope_scaling(rope: RopeConfig) -> Json | None:
    """The value of rope_scaling; None without one."""
    if rope.scaling == "none":
        return None
    values = {there: getattr(rope, here) for there, here in WORDS[rope.scaling].items()}
    if rope.scaling == "longrope":
        values["attention_factor"] = rope.amplitude  # said, so that no reader works it out by another factor
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value is not None}
    return {"rope_type": rope.scaling} | listed


def read_rope(parameters: Mapping[str, Any], *, max_positions: int) -> RopeConfig:
    """The settings that rope_parameters hold.

    Raises UserError for a kind of scaling, or a word of one, that our decoder cannot compute.
    """
    kind = parameters["rope_type"]
    scaling = "none" if kind == "default" else kind
    if scaling not in WORDS:
        supported = ", ".join(["default", *list(WORDS)[1:]])
        raise UserError(f"config.json: rope_type={shown(kind)} is not supported, only {supported} are")
    words = WORDS[scaling]
    derived = _DERIVED.get(scaling, set())
    if unknown := sorted(parameters.keys() - _SHARED - words.keys() - derived):
        raise UserError(f"config.json: rope_parameters of rope_type={kind} hold {', '.join(unknown)}, which is not supported")
    given = {name: parameters[name] for name in words if parameters.get(name) is not None}
    fraction = 1.0 if parameters.get("partial_rotary_factor") is None else parameters["partial_rotary_factor"]
    for name, value in {"rope_theta": parameters.get("rope_theta"), "partial_rotary_factor": fraction, **given}.items():
        if not all(isinstance(number, (int, float)) for number in (value if isinstance(value, list) else [value])):
            raise UserError(f"config.json: {name}={shown(value)} of rope_parameters is no number")
    settings: Json = {words[name]: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if scaling in ("yarn", "longrope") and "factor" not in given:
        settings["factor"] = max_positions / parameters["original_max_position_embeddings"]
    if scaling == "yarn" and "attention_factor" not in given and all(parameters.get(name) for name in derived):
        of_scores, of_all = (_magnitude(settings["factor"], parameters[name]) for name in ("mscale", "mscale_all_dim"))
        settings["attention_factor"] = of_scores / of_all
    try:
        return RopeConfig(
            base=float(parameters["rope_theta"]),
            fraction=float(fraction),
            scaling=scaling,
            **{name: float(value) if isinstance(value, int) and name in _FLOATS else value for name, value in settings.items()},
        )
    except ConfigError as error:
        raise ConfigError([f"rope.{problem}" for problem in error.problems]) from None


_FLOATS = {"factor", "low_frequency_factor", "high_frequency_factor", "fast_turns", "slow_turns", "attention_factor"}


def _magnitude(factor: float, scale: float) -> float:
    """How much longer attention makes its scores; Peng et al. 2023, section 3.4, with DeepSeek's weights."""
    return 1.0 if factor <= 1 else 0.1 * scale * log(factor) + 1.0
