"""Families of models that Hugging Face has classes for: one map of names and one translation of settings each."""

from __future__ import annotations

from train.convert.families.exaone4 import EXAONE4
from train.convert.families.family import Family
from train.convert.families.gemma import GEMMA, GEMMA2, GEMMA3
from train.convert.families.gpt2 import GPT2
from train.convert.families.gpt_neox import GPT_NEOX
from train.convert.families.llama import LLAMA
from train.convert.families.mistral import MISTRAL
from train.convert.families.olmo2 import OLMO2
from train.convert.families.phi3 import PHI3
from train.convert.families.qwen import QWEN2, QWEN3
from train.convert.families.stablelm import STABLELM

# By the name of model.family; `train.config.families` says what each of them can hold.
FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "stablelm": STABLELM,
    "exaone4": EXAONE4,
}
