"""Continuations of many prompts, in batches over one ragged cache; a finished one makes room for the others.

Shapes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.errors import UserError
from train.config.model import ModelConfig
from train.inference.cached import CachedDecoder, KeyValueCache
from train.inference.generation import PREFILL_TOKENS, Continuation, Request, generate_ids
from train.inference.sampling import Sampling, choose
from train.model.init import keyed_seed
from train.model.transformer import Decoder
from train.parallel import ParallelContext


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What to continue, and how far."""

    ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling(temperature=0.0)
    seed: int = 0


@dataclass(kw_only=True)
class _Row:
    """One prompt while it is continued."""

    number: int
    prompt: Prompt
    watch: Continuation
    generator: torch.Generator
    ids: list[int]

    @property
    def is_done(self) -> bool:
        """Whether nothing more comes."""
        return self.watch.finished or len(self.ids) >= self.prompt.max_new_tokens


class BatchGenerator:
    """Continues prompts under a model on this rank's device; all ranks must ask for the same."""

    def __init__(
        self,
        decoder: Decoder,
        model: ModelConfig,
        *,
        context: ParallelContext,
        batch_tokens: int,
        num_known_ids: int | None = None,
    ) -> None:
        """`batch_tokens`: cached positions that a batch may have, holes included; one longer prompt runs alone.

        `num_known_ids`: ids that the tokenizer can spell, where the model's vocabulary has more.
        """
        self.decoder, self.model, self.context = CachedDecoder(decoder, model), model, context
        self.batch_tokens, self.num_known_ids = batch_tokens, num_known_ids

    def generate(
        self,
        prompts: Sequence[Prompt],
        watch: Callable[[int], Continuation],
        *,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[list[int]]:
        """New ids of each prompt, in their order, up to and with the one that ended it.

        `watch` makes for a prompt's number what says when it has ended. Prompt and continuation must fit the context.
        Raises UserError for those that do not, and when the model gives no finite logits.
        """
        for number, prompt in enumerate(prompts):
            length = len(prompt.ids) + prompt.max_new_tokens - 1
            if not prompt.ids or length > self.model.max_positions:
                raise UserError(
                    f"prompt {number}: {len(prompt.ids)} tokens and up to {prompt.max_new_tokens} new ones; it needs at least "
                    f"one, and together they must fit model.max_positions={self.model.max_positions}"
                )
        mine: dict[int, list[int]] = {}
        ranks, rank = self.context.data_parallel, self.context.data_rank
        batches = self._batches(prompts)
        for first in range(0, len(batches), ranks):
            together = batches[first : first + ranks]
            if rank < len(together):
                rows = [self._row(number, prompts[number], watch(number)) for number in together[rank]]
                self._continue(rows)
                mine |= {row.number: row.ids for row in rows}
            progress(sum(map(len, together)))
        parts = self.context.gather_to_all(mine)
        made = {number: ids for part in parts for number, ids in part.items()}
        return [made[number] for number in range(len(prompts))]

    def _batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Numbers of the prompts that run together, the longest first."""
        if self.decoder.rotary.asks_for_lengths:  # longrope runs a context anew when it outgrows itself
            return [[number] for number in range(len(prompts))]
        order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number].ids), prompts[number].ids))
        batches: list[list[int]] = []
        longest = newest = 0
        for number in order:
            newest = max(newest, prompts[number].max_new_tokens)
            if not batches or (len(batches[-1]) + 1) * (longest + newest) > self.batch_tokens:
                batches.append([])
                longest, newest = len(prompts[number].ids), prompts[number].max_new_tokens
            batches[-1].append(number)
        return batches

    def _row(self, number: int, prompt: Prompt, watch: Continuation) -> _Row:
        generator = torch.Generator().manual_seed(keyed_seed(prompt.seed, "prompt", number))
        return _Row(number=number, prompt=prompt, watch=watch, generator=generator, ids=[])

    def _continue(self, rows: Sequence[_Row]) -> None:
        if self.decoder.rotary.asks_for_lengths:
            self._continue_alone(rows[0])
            return
        device = self.context.device
        longest, newest = max(len(row.prompt.ids) for row in rows), max(row.prompt.max_new_tokens for row in rows)
        lengths_B = torch.tensor([len(row.prompt.ids) for row in rows], device=device)
        places_S = torch.arange(longest, device=device)
        positions_BS = torch.where(places_S < lengths_B.unsqueeze(1), places_S, -1)
        padded = [(*row.prompt.ids, *[0] * (longest - len(row.prompt.ids))) for row in rows]
        cache = self.decoder.new_cache(num_sequences=len(rows), capacity=longest + newest - 1, ragged=True)
        last_B1H = self._prefill(torch.tensor(padded, device=device), positions_BS, lengths_B, cache)
        live = list(rows)
        next_B = lengths_B
        while True:
            chosen_B = self._choose(self.decoder.logits(last_B1H)[:, -1], live)
            for row, token_id in zip(live, chosen_B.tolist(), strict=True):
                if not row.is_done:
                    row.ids.append(token_id)
                    row.watch.push(token_id)
            open_rows = [place for place, row in enumerate(live) if not row.is_done]
            if not open_rows:
                return
            if 2 * len(open_rows) <= len(live):  # copying the keys of the rest costs less than running the finished
                kept = torch.tensor(open_rows, device=device)
                cache, chosen_B, next_B = cache.select(kept), chosen_B[kept], next_B[kept]
                live = [live[place] for place in open_rows]
            # A finished row may have come to the end of the model's positions; what it gives is not looked at.
            positions_B1 = next_B.clamp(max=self.model.max_positions - 1).unsqueeze(1)
            last_B1H = self.decoder.advance(chosen_B.unsqueeze(1), cache, positions_BS=positions_B1)
            next_B = next_B + 1

    def _prefill(self, tokens_BS: Tensor, positions_BS: Tensor, lengths_B: Tensor, cache: KeyValueCache) -> Tensor:
        """Run the prompts into the empty cache, piece by piece; hidden states [B, 1, H] of the last token of each."""
        numbers_B = torch.arange(len(tokens_BS), device=tokens_BS.device)
        last_B1H = None
        for first in range(0, tokens_BS.shape[1], PREFILL_TOKENS):
            piece = slice(first, first + PREFILL_TOKENS)
            hidden_BSH = self.decoder.advance(tokens_BS[:, piece], cache, positions_BS=positions_BS[:, piece])
            places_B = lengths_B - 1 - first
            found_B1H = hidden_BSH[numbers_B, places_B.clamp(0, hidden_BSH.shape[1] - 1)].unsqueeze(1)
            # A prompt that ended before this piece keeps what it had; one that goes on is looked up again.
            last_B1H = found_B1H if last_B1H is None else torch.where((places_B >= 0)[:, None, None], found_B1H, last_B1H)
        return last_B1H

    def _choose(self, logits_BV: Tensor, rows: Sequence[_Row]) -> Tensor:
        if not torch.isfinite(logits_BV.amax(dim=-1)).all():
            raise UserError("the model's logits are not finite: its weights are damaged or it diverged in training")
        known_BV = logits_BV[:, : self.num_known_ids]
        uniform_B = torch.stack([torch.rand((), generator=row.generator, dtype=torch.float64) for row in rows])
        uniform_B = uniform_B.to(logits_BV.device)
        if len({row.prompt.sampling for row in rows}) == 1:
            return choose(known_BV, uniform_B, rows[0].prompt.sampling)
        parts = zip(known_BV.split(1), uniform_B.split(1), rows, strict=True)
        return torch.cat([choose(logits_1V, uniform_1, row.prompt.sampling) for logits_1V, uniform_1, row in parts])

    def _continue_alone(self, row: _Row) -> None:
        request = Request(
            prompt=row.prompt.ids,
            max_new_tokens=row.prompt.max_new_tokens,
            sampling=row.prompt.sampling,
            seed=row.generator.initial_seed(),
            num_known_ids=self.num_known_ids,
        )
        for ids in generate_ids(self.decoder, request):
            row.ids.append(ids[0])
            row.watch.push(ids[0])
            if row.is_done:
                return
