"""What a model family is to an exchange: the names of its tensors, and its settings in the words of Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from conf.errors import UserError
from conf.schema import shown
from train.config.model import ModelConfig
from train.convert.rules import Rule

Json: TypeAlias = dict[str, Any]


class Fields:
    """The fields of a config.json, defaults filled in; it remembers which were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.read: set[str] = set()
        self.notes: list[str] = []
        """What a person should know of the translation."""

    def __getitem__(self, name: str) -> Any:
        """The value of a field. Raises UserError when there is no such field."""
        self.read.add(name)
        try:
            return self._values[name]
        except KeyError:
            raise UserError(f"config.json: lacks {name}, which its model_type has") from None

    def get(self, name: str) -> Any:
        """The value of a field; None where a family has no such field."""
        self.read.add(name)
        return self._values.get(name)

    def need(self, name: str, *allowed: Any) -> None:
        """Raise UserError unless the field has one of the values that our decoder can compute."""
        value = self[name]
        if value not in allowed:
            expected = " or ".join(shown(choice) for choice in allowed)
            raise UserError(f"config.json: {name}={shown(value)} is not supported, only {expected} is")

    def choice(self, name: str, choices: Mapping[str, str]) -> str:
        """What the field's value is called here. Raises UserError for a value that we have no word for."""
        self.need(name, *choices)
        return choices[self[name]]

    def dropout(self, *names: str) -> float:
        """The one rate of all the family's rates; 0 and a note when they differ: it is no part of what a model computes."""
        rates = [float(self[name] or 0.0) for name in names]
        if len(set(rates)) == 1 and (len(rates) > 1 or rates[0] == 0):
            return rates[0]
        given = ", ".join(f"{name}={rate:g}" for name, rate in zip(names, rates, strict=True))
        self.notes.append(f"{given}: a model has one rate of dropout here; it is imported with model.dropout=0")
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Family:
    """A line of the exchange: files of `model_type` and our models of one family, both ways."""

    model_type: str
    """Of config.json."""
    architecture: str
    """Class of transformers that trains and generates."""
    classifier: str | None = None
    """Class of transformers that tells labels apart from the last token of a row; None: there is none."""
    rules: tuple[Rule, ...]
    """The key map."""
    write: Callable[[ModelConfig], Json]
    """The fields of config.json that are the family's own."""
    read: Callable[[Fields], Json]
    """The inverse: settings of our model; those that all families share are left to the caller."""
    prefix: str = "model."
    """What names begin with; files of the bare model, without a head, lack it."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names that files are known to have, and the rules' names."""
    buffers: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    """Patterns of names that hold no weights: older releases saved what they could compute."""

    def class_of(self, model: ModelConfig) -> str:
        """Class of transformers that computes what `model` does. Raises UserError when there is none."""
        if not model.labels:
            return self.architecture
        if self.classifier is None:
            raise UserError(
                f"model.labels={list(model.labels)}: transformers has no class of {self.model_type} that tells labels apart; "
                "it can be exported as a model of another family, where its fields are those of one"
            )
        return self.classifier

    @property
    def head(self) -> str:
        """The rules' name of the output matrix."""
        return next(rule.foreign[0] for rule in self.rules if rule.logical == "head.weight")

    def canonical(self, name: str) -> str | None:
        """The rules' name of a tensor in a file; None for a buffer."""
        if any(re.fullmatch(pattern, name) for pattern in self.buffers):
            return None
        name = self.aliases.get(name, name)
        known = name.startswith(self.prefix) or any(rule.foreign == (name,) for rule in self.rules)
        return name if known else self.prefix + name
