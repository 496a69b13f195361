"""Log-likelihoods of many continuations, each after its context: in batches, and what several share computed once.

Requests with the same context become one unit: the context runs once, its continuations are branches over the cached keys.
Contexts that begin alike, as few-shot prompts do, run what they share once as well. Only the positions that are asked for
reach the head. Which ranks do what depends on the requests alone, so any number of data-parallel ranks gives the same sums.

Shapes: B sequences, S positions, T = B x S, H hidden, V padded vocabulary, N positions that are scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from conf.errors import UserError
from train.config.model import ModelConfig
from train.inference.cached import CachedDecoder, KeyValueCache
from train.model.transformer import Decoder, Reading
from train.parallel import ParallelContext

LOGIT_BYTES = 1 << 26
"""Of the fp32 logits that exist together."""
LEAST_SHARED = 16
"""Tokens that contexts must have in common before running them apart pays for the copy of the keys."""
CACHED_FOR_EACH = 4
"""Cached positions that branches may hold in copies, for each token of a batch."""
ROUND_ON_GPU = 64
"""Lengths are rounded up to this on a GPU: kernels are tried and tuned for every new shape."""


@dataclass(frozen=True, kw_only=True)
class LikelihoodRequest:
    """Which continuation to score after which context; at least one token each."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Of one continuation."""

    loss: float
    """Nats, summed over its tokens: minus the log-likelihood."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest after those before it."""


@dataclass(frozen=True, kw_only=True)
class _Branch:
    number: int
    """Of the request."""
    tokens: tuple[int, ...]


_Fork: TypeAlias = tuple[int, _Branch]  # a branch, and the place of its context in the batch


@dataclass(kw_only=True)
class _Unit:
    """A row that runs, and the continuations that are scored after it."""

    context: tuple[int, ...]
    branches: list[_Branch] = field(default_factory=list)

    @property
    def row(self) -> tuple[int, ...]:
        """What runs first: with one branch all of it but its last token, which is only a target."""
        return self.context if len(self.branches) > 1 else (*self.context, *self.branches[0].tokens[:-1])


@dataclass(frozen=True, kw_only=True)
class _Pick:
    """One token that is scored: which, after which position of which row, and for which request."""

    row: int
    place: int
    target: int
    request: int


class _Sums:
    """Losses and hits of the requests, gathered from wherever their tokens were scored."""

    def __init__(self, num_requests: int, device: torch.device) -> None:
        self.loss = torch.zeros(num_requests, dtype=torch.float64, device=device)
        self.misses = torch.zeros(num_requests, dtype=torch.int64, device=device)

    def add(self, logits_NV: Tensor, places_M: Tensor, targets_M: Tensor, requests_M: Tensor) -> None:
        """Add the losses of M targets, each after one of N positions, to the requests that they are of."""
        loss_M = torch.logsumexp(logits_NV, dim=-1)[places_M] - logits_NV[places_M, targets_M]
        self.loss.index_add_(0, requests_M, loss_M.double())
        self.misses.index_add_(0, requests_M, (logits_NV.argmax(dim=-1)[places_M] != targets_M).long())


class LikelihoodScorer:
    """Scores continuations under a model on this rank's device; all ranks must ask for the same."""

    def __init__(self, decoder: Decoder, model: ModelConfig, *, context: ParallelContext, batch_tokens: int) -> None:
        """`batch_tokens`: tokens that run together, padding included; one longer row runs alone."""
        self.decoder, self.model, self.context = decoder, model, context
        self.cached = CachedDecoder(decoder, model)
        self.batch_tokens = batch_tokens
        self.shares = not self.cached.rotary.asks_for_lengths  # longrope rotates a context by what comes after it
        self.tokens_run = 0
        """Tokens that this rank has run through the model, padding included."""
        self._round = ROUND_ON_GPU if context.device.type == "cuda" else 1

    def score(
        self, requests: Sequence[LikelihoodRequest], *, progress: Callable[[int], None] = lambda done: None
    ) -> list[Likelihood]:
        """The likelihood of each request, in their order; `progress` is told how many more are done over all ranks.

        Raises ValueError for an empty context or continuation, for one that is longer than the model reads, and for an id that
        the model does not know; UserError when the model gives no finite logits.
        """
        self._check(requests)
        self._check_alike(requests)
        sums = _Sums(len(requests), self.context.device)
        ranks, rank = self.context.data_parallel, self.context.data_rank
        batches = self._batches(self._units(requests))
        for number in range(-(-len(batches) // ranks)):
            together = batches[number * ranks : (number + 1) * ranks]
            if rank < len(together):
                self._run(together[rank], sums)
            progress(sum(len(unit.branches) for batch in together for unit in batch))
        # Each request was scored by one rank; the others add zeros.
        loss = self.context.sum_over_data(sums.loss)
        misses = self.context.sum_over_data(sums.misses).tolist()
        if not torch.isfinite(loss).all():
            raise UserError("the model's logits are not finite: its weights are damaged or it diverged in training")
        loss = loss.tolist()
        return [Likelihood(loss=nats, is_greedy=missed == 0) for nats, missed in zip(loss, misses, strict=True)]

    def _check(self, requests: Sequence[LikelihoodRequest]) -> None:
        for number, request in enumerate(requests):
            if not len(request.context) or not len(request.continuation):
                raise ValueError(f"request {number}: needs at least one token of context and one of continuation")
            length = len(request.context) + len(request.continuation) - 1
            if length > self.model.max_positions:
                raise ValueError(f"request {number}: {length} tokens, the model reads {self.model.max_positions}; cut its left")

            if max(max(request.context), max(request.continuation)) >= self.model.vocab_size:
                raise ValueError(f"request {number}: holds an id beyond the model's vocabulary of {self.model.vocab_size}")

    def _check_alike(self, requests: Sequence[LikelihoodRequest]) -> None:
        """Ranks that asked for different things would add up what does not belong together."""
        if self.context.world_size == 1:
            return
        digest = hashlib.blake2b(digest_size=16)
        for request in requests:
            for ids in (request.context, request.continuation):
                digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, dtype=np.int64).tobytes())
        if len(set(self.context.gather_to_all(digest.hexdigest()))) > 1:
            raise RuntimeError("the ranks ask for different likelihoods")

    def _units(self, requests: Sequence[LikelihoodRequest]) -> list[_Unit]:
        """The rows to run, the longest first: what does not fit into memory is found at once."""
        units: dict[object, _Unit] = {}
        for number, request in enumerate(requests):
            context = tuple(request.context)
            key = context if self.shares else number
            unit = units.setdefault(key, _Unit(context=context))
            unit.branches.append(_Branch(number=number, tokens=tuple(request.continuation)))
        return sorted(units.values(), key=lambda unit: (-len(unit.row), unit.row))

    def _batches(self, units: Sequence[_Unit]) -> list[list[_Unit]]:
        batches: list[list[_Unit]] = []
        for unit in units:  # the first of a batch is its longest
            if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].row) > self.batch_tokens:
                batches.append([])
            batches[-1].append(unit)
        return batches

    def _run(self, batch: Sequence[_Unit], sums: _Sums) -> None:
        shared = self._shared_tokens(batch)
        if shared or not all(_is_plain(unit) for unit in batch):
            self._run_cached(batch, shared, sums)
            return
        tokens_BS, positions_BS = self._padded([unit.row for unit in batch])
        wanted = _Wanted.of(_row_picks(batch, first=0), tokens_BS)
        self._score(self._plain(tokens_BS, positions_BS, wanted.rows_N), wanted, sums)

    def _shared_tokens(self, batch: Sequence[_Unit]) -> int:
        """Tokens with which all rows of the batch begin; 0 where running them once does not pay."""
        if not self.shares or len(batch) < 2:
            return 0
        least, most = min(unit.row for unit in batch), max(unit.row for unit in batch)
        # One token of each context is left to run with its row, as its hidden state is what the first target needs.
        limit = min(len(unit.context) for unit in batch) - 1
        same = next((place for place, pair in enumerate(zip(least, most, strict=False)) if pair[0] != pair[1]), limit)
        shared = min(same, limit)
        return shared if shared >= LEAST_SHARED else 0

    @torch.no_grad()
    def _plain(self, tokens_BS: Tensor, positions_BS: Tensor, rows_N: Tensor) -> Tensor:
        """Hidden states [N, H] at some places of rows of several lengths, by the kernels of training."""
        num_rows, length = tokens_BS.shape
        starts = torch.arange(num_rows, device=tokens_BS.device, dtype=torch.int32) * length
        bounds = torch.cat((starts, starts.new_tensor([num_rows * length])))
        if not self.shares:  # each row apart from its padding, so that its own length decides
            ends = starts + (positions_BS >= 0).sum(dim=1, dtype=torch.int32)
            bounds = torch.cat((torch.stack((starts, ends), dim=1).flatten(), bounds[-1:]))
        self.decoder.read_as(Reading(sequence_length=length, document_mask=not self.shares))
        tokens_T, positions_T = tokens_BS.flatten(), positions_BS.flatten().clamp(min=0)
        state = (tokens_T, tokens_T, positions_T, bounds)
        embedding, *blocks, last, _, _ = self.decoder.layers  # the final norm and the head run over what is scored
        for layer in (embedding, *blocks):
            state = layer(state)
        self.tokens_run += tokens_T.numel()
        derived = last.deriver.derive(positions_T, bounds, state[0].dtype)
        return last.at(state[0], rows_N, lambda normed_TH: last.attention.mix(normed_TH, derived))

    def _run_cached(self, batch: Sequence[_Unit], shared: int, sums: _Sums) -> None:
        tokens_BS, positions_BS = self._padded([unit.row[shared:] for unit in batch], first=shared)
        capacity = shared + tokens_BS.shape[1]
        device = self.context.device
        if shared:
            alone = self.cached.new_cache(num_sequences=1, capacity=shared)
            self.cached.advance(torch.tensor([batch[0].row[:shared]], device=device), alone)
            everyone = torch.zeros(len(batch), dtype=torch.int64, device=device)
            cache = alone.select(everyone, capacity=capacity, ragged=True)
        else:
            cache = self.cached.new_cache(num_sequences=len(batch), capacity=capacity, ragged=True)
        wanted = _Wanted.of(_row_picks(batch, first=shared), tokens_BS)
        hidden_NH = self.cached.advance(tokens_BS, cache, positions_BS=positions_BS, rows_N=wanted.rows_N)
        self.tokens_run += shared + tokens_BS.numel()
        self._score(hidden_NH, wanted, sums)
        forks = [
            (place, branch)
            for place, unit in enumerate(batch)
            if not _is_plain(unit)
            for branch in unit.branches
            if len(branch.tokens) > 1
        ]
        for part in self._fork_batches(forks, capacity):
            self._run_forks(batch, part, cache, sums)

    def _fork_batches(self, forks: Sequence[_Fork], capacity: int) -> Iterator[Sequence[_Fork]]:
        """Parts that run together, so that neither what runs nor the copies of the cached keys grow with the branches."""
        longest = max((len(branch.tokens) for _, branch in forks), default=1)
        most = max(1, min(self.batch_tokens // longest, CACHED_FOR_EACH * self.batch_tokens // (capacity + longest)))
        for first in range(0, len(forks), most):
            yield forks[first : first + most]

    def _run_forks(self, batch: Sequence[_Unit], forks: Sequence[_Fork], cache: KeyValueCache, sums: _Sums) -> None:
        """Run the branches behind their contexts, which `cache` holds."""
        device = self.context.device
        parents = torch.tensor([place for place, _ in forks], device=device)
        starts_B1 = torch.tensor([[len(batch[place].row)] for place, _ in forks], device=device)
        tokens_BS, positions_BS = self._padded([branch.tokens[:-1] for _, branch in forks])
        positions_BS = torch.where(positions_BS >= 0, positions_BS + starts_B1, positions_BS)
        grown = cache.select(parents, capacity=cache.capacity + tokens_BS.shape[1])
        picks = [
            _Pick(row=row, place=place, target=target, request=branch.number)
            for row, (_, branch) in enumerate(forks)
            for place, target in enumerate(branch.tokens[1:])
        ]
        wanted = _Wanted.of(picks, tokens_BS)
        hidden_NH = self.cached.advance(tokens_BS, grown, positions_BS=positions_BS, rows_N=wanted.rows_N)
        self.tokens_run += tokens_BS.numel()
        self._score(hidden_NH, wanted, sums)

    def _score(self, hidden_NH: Tensor, wanted: _Wanted, sums: _Sums) -> None:
        most = max(1, LOGIT_BYTES // (4 * self.model.padded_vocab_size))
        for first in range(0, len(hidden_NH), most):
            logits_NV = self.cached.logits(hidden_NH[None, first : first + most])[0]
            inside = (wanted.places_M >= first) & (wanted.places_M < first + most)
            sums.add(logits_NV, wanted.places_M[inside] - first, wanted.targets_M[inside], wanted.requests_M[inside])

    def _padded(self, rows: Sequence[Sequence[int]], *, first: int = 0) -> tuple[Tensor, Tensor]:
        """Tokens and positions [B, S], the positions counted from `first`; padding behind each row has position -1."""
        longest = max(map(len, rows))
        length = min(-(-longest // self._round) * self._round, max(longest, self.model.max_positions))
        tokens_BS = np.zeros((len(rows), length), dtype=np.int64)
        positions_BS = np.full((len(rows), length), -1, dtype=np.int64)
        for number, row in enumerate(rows):
            tokens_BS[number, : len(row)] = row
            positions_BS[number, : len(row)] = np.arange(first, first + len(row))
        device = self.context.device
        return torch.from_numpy(tokens_BS).to(device), torch.from_numpy(positions_BS).to(device)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """The positions of a batch that are scored, each once, and the tokens that are scored after them."""

    rows_N: Tensor
    """Places in B x S."""
    places_M: Tensor
    """Which of the N positions each of the M targets comes after."""
    targets_M: Tensor
    requests_M: Tensor

    @staticmethod
    def of(picks: Sequence[_Pick], tokens_BS: Tensor) -> _Wanted:
        """What `picks` ask of a batch."""
        length, device = tokens_BS.shape[1], tokens_BS.device
        flat = np.array([pick.row * length + pick.place for pick in picks], dtype=np.int64)
        rows_N, places_M = np.unique(flat, return_inverse=True)
        targets = np.array([(pick.target, pick.request) for pick in picks], dtype=np.int64)
        return _Wanted(
            rows_N=torch.from_numpy(rows_N).to(device),
            places_M=torch.from_numpy(places_M).to(device),
            targets_M=torch.from_numpy(targets[:, 0].copy()).to(device),
            requests_M=torch.from_numpy(targets[:, 1].copy()).to(device),
        )


def _row_picks(batch: Sequence[_Unit], *, first: int) -> list[_Pick]:
    """What the rows themselves predict, of which the first `first` tokens ran before: all of a lone continuation, the first
    token of each of several."""
    picks = []
    for row, unit in enumerate(batch):
        place = len(unit.context) - 1 - first
        for branch in unit.branches:
            targets = branch.tokens if _is_plain(unit) else branch.tokens[:1]
            picks += [
                _Pick(row=row, place=place + later, target=target, request=branch.number)
                for later, target in enumerate(targets)
            ]
    return picks


def _is_plain(unit: _Unit) -> bool:
    """Whether its one continuation lies in its row."""
    return len(unit.branches) == 1
