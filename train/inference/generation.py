"""The loop of generation: a prompt once, then one token a step for all samples; and the text that each sample becomes.

Shapes: B samples, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from conf.errors import UserError
from train.inference.cached import CachedDecoder, KeyValueCache
from train.inference.sampling import Sampling, choose
from train.inference.text import StopFilter
from train.model.init import keyed_seed

PREFILL_TOKENS = 512
"""Prompt positions run at a time: bounds the score matrix of kernels that write one, 512 x context a head."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to continue, how long and how."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    num_samples: int = 1
    seed: int = 0
    num_known_ids: int | None = None
    """Ids that the tokenizer can spell, where the model's vocabulary has more; None: all of the model's."""


def generate_ids(decoder: CachedDecoder, request: Request) -> Iterator[list[int]]:
    """Yield one new id for each sample, `max_new_tokens` times; close the iterator to stop before.

    Raises UserError when prompt and continuation exceed the model's context, or when the model gives no finite logits.
    """
    model, count = decoder.model, len(request.prompt)
    if count == 0:
        raise UserError("prompt: is no token to this tokenizer; give it at least one character")
    # The last new token is not run through the model.
    capacity = count + request.max_new_tokens - 1
    if capacity > model.max_positions:
        raise UserError(
            f"max_new_tokens={request.max_new_tokens}: the prompt has {count} tokens, and together they exceed "
            f"model.max_positions={model.max_positions}; shorten the prompt or the continuation"
        )
    cache = decoder.new_cache(num_sequences=1, capacity=capacity)
    prompt_1S = torch.tensor([request.prompt], device=decoder.weight.device)
    logits_BV = _prefill(decoder, prompt_1S, cache).expand(request.num_samples, -1)
    if not torch.isfinite(logits_BV.max()):
        raise UserError("the model's logits are not finite: its weights are damaged or it diverged in training")
    if request.num_samples > 1:
        cache = cache.select(torch.zeros(request.num_samples, dtype=torch.int64, device=prompt_1S.device))
    # A generator for each sample, on the CPU: the draws depend on neither the device nor the number of samples.
    generators = [
        torch.Generator().manual_seed(keyed_seed(request.seed, "sample", number)) for number in range(request.num_samples)
    ]
    context_BS = prompt_1S.expand(request.num_samples, -1)
    for number in range(request.max_new_tokens):
        if number and decoder.outgrows(cache):
            cache.length = 0  # run anew, as transformers does for Phi 3
            logits_BV = _prefill(decoder, context_BS, cache)
        elif number:
            logits_BV = decoder.logits(decoder.advance(context_BS[:, -1:], cache))[:, -1]
        uniform_B = torch.stack([torch.rand((), generator=each, dtype=torch.float64) for each in generators])
        tokens_B = choose(logits_BV[:, : request.num_known_ids], uniform_B.to(logits_BV.device), request.sampling)
        context_BS = torch.cat((context_BS, tokens_B.unsqueeze(1)), dim=1)
        yield tokens_B.tolist()


def _prefill(decoder: CachedDecoder, context_BS: Tensor, cache: KeyValueCache) -> Tensor:
    """Run whole contexts into the empty cache; returns the logits [B, V] after their last tokens."""
    for chunk_BS in context_BS.split(PREFILL_TOKENS, dim=1):
        hidden_BSH = decoder.advance(chunk_BS, cache, length=context_BS.shape[1])
    return decoder.logits(hidden_BSH[:, -1:])[:, -1]


class TextStream(Protocol):
    """Turns ids into text as they come, whole characters only."""

    def push(self, token_id: int) -> str:
        """The text that is certain after one more id; may be empty."""


class Continuation:
    """One sample: ids in, text that may be shown out, until its end."""

    def __init__(self, stream: TextStream, *, stop: Sequence[str] = (), ends: Collection[int] = ()) -> None:
        """`stop`: texts at which it ends, without them; `ends`: ids at which it does."""
        self.num_tokens = 0
        self.finished = False
        self._stream = stream
        self._filter = StopFilter(stop)
        self._ends = frozenset(ends)

    def push(self, token_id: int) -> str:
        """The text that may be shown after one more id; empty once the sample is finished."""
        if self.finished:
            return ""
        self.num_tokens += 1
        if token_id in self._ends:
            return self.finish()
        shown = self._filter.push(self._stream.push(token_id))
        self.finished = self._filter.stopped
        return shown

    def finish(self) -> str:
        """End the sample; returns the text that was held back in case it were a stop text."""
        self.finished = True
        return self._filter.flush()
