"""How labelled rows become sequences to train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conf.errors import ConfigError
from data_pipeline.config import Verify

Targets = Literal["auto", "all", "completion", "assistant", "last_turn"]


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """How labelled rows become sequences to train on."""

    sequence_length: int = 1024
    """Tokens of a sequence; left out, at most what the model takes. Of a longer row the beginning of its prompt is cut, then
    the end of its answer. Both answers of a preference, each with the prompt, share a sequence."""
    packing: bool = True
    """Put several whole rows into one sequence, where none sees another; false: one row in a sequence."""
    targets: Targets = "auto"
    """Which tokens the model learns to write. completion: what stands behind the prompt; assistant: all turns of the assistant;
    last_turn: its last one; all: everything; auto: completion for prompts, assistant for dialogues."""
    validation_fraction: float = 0.05
    """Share of the training rows that is held out, by their content; without effect where task.validation names files."""
    bad_rows: Literal["stop", "drop"] = "stop"
    """What happens when a row cannot be used: say which and why, or leave such rows out and count them."""
    template: str | None = None
    """How dialogues are written out: a jinja file, or chatml or plain, which are built in; null: the tokenizer's own chat
    template, else chatml where the tokenizer has its tokens, else plain. Preferences that are texts are written out as
    dialogues only when a template is given."""
    system: str | None = None
    """What the system says first in a dialogue where it says nothing; null: nothing. Preferences that are texts need a
    template for it."""

    verify: Verify = "once"
    """What is checked of the encoded rows before a run. once: the hash of every file that was not hashed before, or whose
    size, time of change or inode is another than then; full: the hash of every file; sizes: only the files' sizes."""

    def __post_init__(self) -> None:
        problems = []
        if self.sequence_length < 2:
            problems.append(f"sequence_length={self.sequence_length}: must be at least 2, one to read and one to predict")
        if not 0 <= self.validation_fraction < 1:
            problems.append(
                f"validation_fraction={self.validation_fraction}: must be at least 0, for none, and below 1, such as 0.05"
            )
        if self.template == "":
            problems.append("template='': needs a jinja file, chatml or plain; null takes the tokenizer's own")
        if self.system == "":
            problems.append("system='': a system turn without a word; null leaves it out")
        if problems:
            raise ConfigError(problems)
