"""Settings of `longhaul generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conf.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    checkpoint: str
    """Folder of a checkpoint, or of a run, whose newest checkpoint is taken."""
    prompt: str | None = None
    """Text to continue, or the one question of a chat; without it and prompt_file a chat begins."""
    prompt_file: str | None = None
    """UTF-8 file with that text."""
    chat: bool | None = None
    """Turns in the form that the model has learned, with all that was said before; null: where there is no prompt, at a
    terminal. true: standard input may also be a pipe, each line of it a turn; with a prompt, one question and its answer."""
    system: str | None = None
    """What the system says first in a chat; null: what it said in the model's training; '': nothing."""
    max_new_tokens: int = 256
    """Most tokens of one continuation, or of an answer."""
    temperature: float = 0.8
    """Divides the logits before the softmax; 0 takes the likeliest token at every step."""
    top_k: int | None = None
    """Choose among this many likeliest tokens; null: among all."""
    top_p: float | None = None
    """Choose among the fewest likeliest tokens whose probability reaches this; null: among all."""
    stop: tuple[str, ...] = ()
    """Texts at which a continuation ends; they are not shown."""
    num_samples: int = 1
    """Continuations of the prompt, drawn side by side."""
    seed: int = 0
    """Seed of the draws; sample n is the same whatever num_samples is."""
    stream: bool = True
    """Show the text while it grows; false: when all of it is there."""
    tensor: int = 1
    """Ranks of this machine that share the model; for one that a single GPU cannot hold."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What to compute on; auto: CUDA when this machine has it."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Weights and activations; auto: bf16 where the GPU or the CPU multiplies it, fp32 elsewhere."""
    verify: bool = True
    """Compare the checkpoint's files with their hashes before they are read (about 1 GB a second)."""

    def __post_init__(self) -> None:
        problems = []
        if not self.checkpoint:
            problems.append("checkpoint='': needs the folder of a checkpoint or of a run")
        if self.prompt is not None and self.prompt_file is not None:
            problems.append("prompt: give one of prompt and prompt_file, not both")
        if self.chat is False and not self._has_prompt:
            problems.append("chat=false: needs a text to continue; give prompt or prompt_file")
        if self.system is not None and not self.chats:
            problems.append("system: is of a chat; give chat=true with it")
        if self.chats and self.num_samples > 1:
            problems.append(f"num_samples={self.num_samples}: a chat has one answer to a question; take 1, or give a prompt")
        if self.prompt == "":
            problems.append("prompt='': needs at least one character to continue")
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if self.temperature < 0:
            problems.append(f"temperature={self.temperature}: must not be negative; 0 takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k={self.top_k}: must be at least 1; null means all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p}: must be above 0 and at most 1; null means all tokens")
        if self.temperature == 0 and self.num_samples > 1:
            problems.append(
                f"num_samples={self.num_samples}: with temperature=0 all samples are the same; raise temperature or take 1"
            )
        if "" in self.stop:
            problems.append("stop: holds an empty text, which ends every continuation at once; remove it")
        if self.tensor < 1:
            problems.append(f"tensor={self.tensor}: must be at least 1")
        if self.num_samples < 1:
            problems.append(f"num_samples={self.num_samples}: must be at least 1")
        if problems:
            raise ConfigError(problems)

    @property
    def chats(self) -> bool:
        """Whether turns are exchanged, rather than a text continued."""
        return self.chat if self.chat is not None else not self._has_prompt

    @property
    def _has_prompt(self) -> bool:
        return self.prompt is not None or self.prompt_file is not None
