"""The model's settings in the words of Hugging Face: config.json and generation_config.json.

What a family cannot say is refused when a configuration is made, by the tables of `train.config.families`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from conf.errors import ConfigError, UserError
from conf.schema import shown
from train.config.model import ModelConfig
from train.convert.families import FAMILIES
from train.convert.families.family import Family, Fields, Json

DType: TypeAlias = Literal["fp32", "bf16", "fp16"]
DTYPE_NAMES: dict[str, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Fields that change nothing of what a decoder computes.
INERT = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "return_dict", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward", "classifier_dropout", "summary_type", "summary_use_proj",
    "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "vocab_size", "tie_word_embeddings",
    "initializer_range",
}  # fmt: skip
# Fields that some class computes with: where a family has no such field, a value is no remark that can be left out.
COMPUTED = {
    "alibi", "clip_qkv", "lm_head_bias", "no_rope_layers", "rope_interleaved", "sliding_window", "use_sliding_window",
    "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "embedding_multiplier", "residual_multiplier",
    "attention_multiplier", "logits_scaling", "num_local_experts", "num_experts",
}  # fmt: skip
# Older words of fields that are read in their new form.
OLDER = {
    "rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "rope_local_base_freq", "partial_rotary_factor",
    "sliding_window_pattern", "layer_types", "torch_dtype", "original_max_position_embeddings",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Ids that a reader of the model needs to know; None: the tokenizer has no such token."""

    bos: int | None
    eos: int | None
    pad: int | None = None
    """Of a model that tells labels apart, which transformers reads at the last token of a row that is not this one: an id
    that no row ends in, see `train.convert.hf_export.padding_id`. None: rows are read at their last token, one at a time."""


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """What a config.json says of a model."""

    model: ModelConfig
    family: Family
    notes: tuple[str, ...] = ()
    """What a person should know of the translation."""


def check_expressible(model: ModelConfig) -> None:
    """Raise UserError when no Hugging Face class is named for this model; a family's fields were checked at its making."""
    if model.family not in FAMILIES:
        raise UserError(
            f"model.family={model.family}: no Hugging Face class is named for this model; it can be exported when its fields "
            f"are those of a family, one of {', '.join(FAMILIES)}"
        )
    FAMILIES[model.family].class_of(model)
    if model.width_ratio != 1.0:
        raise UserError(
            f"model.mup_base_width={model.mup_base_width}: Hugging Face's {model.family} has no multiplier of the "
            "logits, which muP needs; export a run whose width is its base"
        )


def model_config(model: ModelConfig, special: SpecialIds, dtype: DType) -> Json:
    """The content of config.json."""
    check_expressible(model)
    family = FAMILIES[model.family]
    return {
        "architectures": [family.class_of(model)],
        "model_type": family.model_type,
        **family.write(model),
        "vocab_size": model.vocab_size,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_head,
        # Said even when there is none: the classes have defaults of their own, ids of other tokenizers.
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad if model.labels else None,
        "use_cache": True,
        # transformers 5 reads `dtype`, older releases and other readers `torch_dtype`.
        "dtype": DTYPE_NAMES[dtype],
        "torch_dtype": DTYPE_NAMES[dtype],
        **_label_fields(model),
    }


def _label_fields(model: ModelConfig) -> Json:
    if not model.labels:
        return {}
    return {
        "num_labels": len(model.labels),
        "id2label": {str(number): label for number, label in enumerate(model.labels)},
        "label2id": {label: number for number, label in enumerate(model.labels)},
        "problem_type": "single_label_classification",
    }


def generation_config(special: SpecialIds) -> Json:
    """The content of generation_config.json."""
    ids = {"bos_token_id": special.bos, "eos_token_id": None if special.eos is None else [special.eos]}
    return {name: value for name, value in ids.items() if value is not None}


def read_model_config(folder: Path) -> ReadConfig:
    """The model that the config.json of `folder` describes; defaults and older words are filled in by transformers.

    Raises UserError for a family that is not there, and for every setting that our decoder cannot compute.
    """
    family_name, raw, has_labels = _family_of(folder)
    family = FAMILIES[family_name]
    values, defaults = _filled_in(folder)
    fields = Fields(values)
    try:
        settings = family.read(fields) | (_read_labels(fields) if has_labels else {})
        model = ModelConfig(
            family=family_name,
            vocab_size=fields["vocab_size"],
            tied_head=bool(fields["tie_word_embeddings"]),
            init_std=fields["initializer_range"] or 0.02,
            **settings,
        )
    except ConfigError as error:
        told = [problem.partition("; take that, or family=custom")[0] for problem in error.problems]
        raise ConfigError([f"{folder / 'config.json'}, read as model.{problem}" for problem in told]) from None
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if active := sorted(name for name in raw.keys() & COMPUTED - fields.read if raw[name]):
        path = folder / "config.json"
        raise ConfigError([f"{path}: {name}={shown(raw[name])} is no part of {family.model_type} here" for name in active])
    beyond = {name: value for name, value in values.items() if name not in fields.read | INERT and not name.startswith("_")}
    unsupported = [
        f"{folder / 'config.json'}: {name}={shown(value)} is not supported, only {shown(defaults[name])} is"
        for name, value in beyond.items()
        if name in defaults and value != defaults[name]
    ]
    if unsupported:
        raise ConfigError(unsupported)
    notes = fields.notes
    if unknown := sorted((raw.keys() & beyond.keys()) - defaults.keys() - OLDER):
        notes.append(f"fields that {family.model_type} does not have, and transformers ignores too: {', '.join(unknown)}")
    return ReadConfig(model=model, family=family, notes=tuple(notes))


def _read_labels(fields: Fields) -> Json:
    """The labels of a model that tells them apart, by their numbers.

    Raises UserError for a model that gives a number, or several labels at once.
    """
    fields.need("problem_type", None, "single_label_classification")
    names = {int(number): str(label) for number, label in fields["id2label"].items()}
    if len(names) < 2 or sorted(names) != list(range(len(names))):
        raise UserError(
            f"config.json: id2label={shown(fields['id2label'])} is not supported, only two labels or more, numbered from 0, are"
        )
    if fields["pad_token_id"] is not None:
        fields.notes.append(
            f"pad_token_id={fields['pad_token_id']}: transformers tells the label at a row's last token that is not this one, "
            "here it is told at the last token: rows may not end in it"
        )
    return {"labels": tuple(names[number] for number in range(len(names)))}


def _family_of(folder: Path) -> tuple[str, Json, bool]:
    """Name of the family that a config.json is of, the file's content, and whether its class tells labels apart."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the folder of a Hugging Face model") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    names = {family.model_type: name for name, family in FAMILIES.items()}
    if kind not in names:
        way_out = ""
        if kind == "gemma3":
            way_out = "; it is of text and images: save its language model with transformers, and import that"
        raise UserError(f"{path}: model_type={shown(kind)} is no family known here, only {', '.join(names)} are{way_out}")
    expected, classifier = FAMILIES[names[kind]].architecture, FAMILIES[names[kind]].classifier
    given = raw.get("architectures") or [expected]
    has_labels = classifier is not None and given == [classifier]
    if not has_labels and [str(name).lower() for name in given] != [expected.lower()]:  # the first Llamas were LLaMAs
        other = "" if classifier is None else f", and {classifier}, which tells labels apart,"
        raise UserError(f"{path}: architectures={shown(given)}: only {expected}, a model of language{other} can be imported")
    if raw.get("quantization_config"):
        raise UserError(f"{path}: quantization_config: the weights are quantised; import the model they were made from")
    return names[kind], raw, has_labels


def _filled_in(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a config.json as transformers understands them, and the defaults of their class."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{folder / 'config.json'}: transformers refuses it: {' '.join(str(error).split())}") from None
    return config.to_dict(), type(config)().to_dict()
