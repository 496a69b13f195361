"""What a run may change when it is resumed: every field of a run is free, adjustable, layout or fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from conf.compose import to_plain
from conf.errors import ConfigError
from conf.schema import shown
from train.config.settings import RunSettings

Kind = Literal["free", "adjustable", "layout", "fixed"]

# The longest prefix that fits a field decides.
KINDS: dict[str, Kind] = {
    "stage": "fixed",
    "run.name": "free",
    "run.folder": "free",
    "run.notes": "free",
    "run.seed": "fixed",
    "model": "fixed",
    "model.dropout": "adjustable",
    "model.z_loss": "adjustable",
    "initial_checkpoint": "fixed",
    "task": "fixed",  # what the rows are follows from it, as far as their fingerprint does not tell
    "task.data": "free",
    "task.validation": "free",
    "task.metrics": "free",
    "task.max_new_tokens": "free",
    "task.stop": "free",
    "task.language": "free",
    "method": "fixed",
    "method.neftune_alpha": "adjustable",
    "method.layer_decay": "adjustable",
    "method.lora.dropout": "adjustable",
    "preference": "adjustable",
    "preference.reference": "free",
    "opening": "fixed",
    "scoring": "free",
    "data": "fixed",  # the sample order follows from it
    "data.sources": "free",  # a corpus may be moved; that its content is the same is told by the data's fingerprint
    "data.max_epochs": "free",
    "data.verify": "free",
    "data.bad_rows": "free",  # rows of which some were left out are told from those with none
    "batch": "adjustable",
    "batch.micro_batch": "layout",
    "budget": "adjustable",
    "budget.stop_at_step": "free",
    "optim": "adjustable",
    "optim.kind": "fixed",  # another optimizer keeps other state
    "schedule": "adjustable",
    "parallel": "layout",
    "kernels": "layout",
    "precision": "adjustable",
    "checkpoint": "free",
    "evaluate": "free",
    "guard": "adjustable",
    "guard.report_samples": "free",
    "watchdog": "free",
    "monitor": "free",
    "launch": "free",
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One field that differs from the configuration of the checkpoint."""

    field: str
    before: Any
    after: Any
    kind: Kind


def kind_of(field: str) -> Kind:
    """Class of a dotted field name."""
    parts = field.split(".")
    for length in range(len(parts), 0, -1):
        if kind := KINDS.get(".".join(parts[:length])):
            return kind
    raise AssertionError(f"{field} has no class; add it to the table")


def changes(before: RunSettings, after: RunSettings) -> list[Change]:
    """Every field that differs, by its dotted name."""
    old, new = leaves(to_plain(before)), leaves(to_plain(after))
    return [
        Change(field=name, before=old.get(name), after=new.get(name), kind=kind_of(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def check_resume(before: RunSettings, after: RunSettings, checkpoint: str) -> list[Change]:
    """The changes that a resumed run has to record: the adjustable ones.

    Raises ConfigError when a fixed field differs, with both values.
    """
    found = changes(before, after)
    fixed = [change for change in found if change.kind == "fixed"]
    if fixed:
        raise ConfigError(
            [
                f"{change.field}={shown(change.after)}: {checkpoint} was trained with {shown(change.before)}, which is fixed "
                f"within a run; put it back, or give another run.name"
                for change in fixed
            ]
        )
    return [change for change in found if change.kind == "adjustable"]


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> leaf; lists count as leaves, and so does a mapping without entries."""
    if not isinstance(tree, dict) or (not tree and prefix):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}.{key}" if prefix else key)
    return found
