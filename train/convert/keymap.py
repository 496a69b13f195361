"""The key map: a family's rules written out for one model, both ways. Owns names and shapes; reads and writes no file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from conf.errors import UserError
from train.config.model import ModelConfig
from train.convert.families import FAMILIES
from train.convert.rules import Rule, Shape, Transform
from train.model.cost import parameter_shapes


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
        by_pattern = _by_pattern(rules_of(model.family) if table is None else table)
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

    def transform(self, logical_name: str) -> Transform:
        """How the values of a logical tensor lie in the foreign ones."""
        return self._rules[logical_name].transform

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


def rules_of(family: str) -> tuple[Rule, ...]:
    """The rules of a family; a custom model has none."""
    return FAMILIES[family].rules if family in FAMILIES else ()


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
