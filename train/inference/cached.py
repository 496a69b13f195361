"""Incremental decoding: the key-value cache, and the decoder's own modules run over it.

Shapes: L layers, B sequences, S new positions, P cached positions, T = B x S, N query heads, K key-value heads, D head size,
H hidden, V padded vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conf.errors import UserError
from train.config.model import ModelConfig
from train.model.attention import CachedView, attend_cached, view_of_cache, view_of_ragged_cache
from train.model.rotary import Rotary
from train.model.transformer import Block, Decoder


class KeyValueCache:
    """Keys and values of every layer, allocated once for `capacity` entries.

    Entry p is position p in every sequence, unless the cache is ragged: then each entry says which position it holds, so
    that sequences of several lengths lie beside each other with holes between what they hold.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        kv_heads: int,
        num_sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        ragged: bool = False,
    ) -> None:
        shape_BKPD = (num_sequences, kv_heads, capacity, model.head_dim)
        self.keys = [torch.empty(shape_BKPD, dtype=dtype, device=device) for _ in range(model.num_layers)]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.capacity = capacity
        self.length = 0
        """Entries that are filled, in every sequence alike."""
        self.positions: Tensor | None = None
        """Of a ragged cache: int64 [B, P], the position of each entry, -1 where a sequence has none."""
        if ragged:
            self.positions = torch.full((num_sequences, capacity), -1, dtype=torch.int64, device=device)

    def put(self, layer: int, key_BKSD: Tensor, value_BKSD: Tensor) -> tuple[Tensor, Tensor]:
        """Store S positions after the filled ones; returns views [B, K, length + S, D] of all keys and values."""
        end = self.length + key_BKSD.shape[2]
        self.keys[layer][:, :, self.length : end] = key_BKSD
        self.values[layer][:, :, self.length : end] = value_BKSD
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, sequences: Tensor, *, capacity: int | None = None, ragged: bool = False) -> KeyValueCache:
        """A cache whose sequences begin as those of this one with the numbers `sequences` (int64 [B']), each as often as named.

        `capacity`: entries that it has room for; None: as many as this one. `ragged`: it is, though this one is not.
        """
        copy = object.__new__(KeyValueCache)
        copy.capacity, copy.length = capacity or self.capacity, self.length
        copy.keys = [self._selected(states, sequences, copy.capacity) for states in self.keys]
        copy.values = [self._selected(states, sequences, copy.capacity) for states in self.values]
        copy.positions = None
        if ragged or self.positions is not None:
            copy.positions = torch.full((len(sequences), copy.capacity), -1, dtype=torch.int64, device=sequences.device)
            held_P = torch.arange(self.length, device=sequences.device)
            copy.positions[:, : self.length] = held_P if self.positions is None else self.positions[sequences, : self.length]
        return copy

    def _selected(self, states_BKPD: Tensor, sequences: Tensor, capacity: int) -> Tensor:
        shape = (len(sequences), states_BKPD.shape[1], capacity, states_BKPD.shape[3])
        made = states_BKPD.new_empty(shape)
        made[:, :, : self.length] = states_BKPD[sequences, :, : self.length]
        return made


class CachedDecoder:
    """The modules of a `Decoder`, run over new positions only."""

    def __init__(self, decoder: Decoder, model: ModelConfig) -> None:
        """Raises UserError for a model that tells labels apart."""
        if model.labels:
            raise UserError(
                f"model.labels={list(model.labels)}: this model tells labels apart, and neither continues text nor says how "
                "likely it is; give a language model"
            )
        self.model = model
        self.embedding, *_, self.final_norm, self.head = decoder.layers
        self.blocks = decoder.blocks
        self.weight = self.embedding.tokens.weight
        self.rotary = Rotary(model)
        self.windows = {block.attention.window for block in self.blocks}

    def new_cache(self, *, num_sequences: int, capacity: int, ragged: bool = False) -> KeyValueCache:
        """An empty cache in the decoder's dtype and on its device.

        Raises UserError when `capacity` exceeds the model's longest context; a ragged one may, as it has holes.
        """
        if capacity > self.model.max_positions and not ragged:
            raise UserError(
                f"a context of {capacity} tokens exceeds model.max_positions={self.model.max_positions}; "
                "shorten the prompt or lower max_new_tokens"
            )
        return KeyValueCache(
            self.model,
            kv_heads=self.blocks[0].attention.kv_heads,  # a tensor rank has its own only
            num_sequences=num_sequences,
            capacity=capacity,
            dtype=self.weight.dtype,
            device=self.weight.device,
            ragged=ragged,
        )

    @torch.inference_mode()
    def advance(
        self,
        tokens_BS: Tensor,
        cache: KeyValueCache,
        *,
        length: int | None = None,
        positions_BS: Tensor | None = None,
        rows_N: Tensor | None = None,
    ) -> Tensor:
        """Run S new positions of every sequence after the cached ones, and cache them; returns hidden [B, S, H].

        `length`: positions that the sequences have with what is to be run right after; None: up to the new ones.
        `positions_BS`: of a ragged cache, the position of each token, -1 for padding, whose hidden states mean nothing.
        `rows_N`: places in B x S whose hidden states are wanted, [N, H] then; the last block does no more than these need.
        """
        num_sequences, num_new = tokens_BS.shape
        start, end = cache.length, cache.length + num_new
        assert end <= cache.capacity, f"{end} positions do not fit a cache of {cache.capacity}"
        assert (positions_BS is None) == (cache.positions is None), "a ragged cache, and no other, is told the positions"
        if positions_BS is None:
            positions_T = torch.arange(start, end, device=tokens_BS.device).repeat(num_sequences)
        else:
            cache.positions[:, start:end] = positions_BS
            positions_T = positions_BS.flatten().clamp(min=0)
        hidden_TH = self.embedding.embed(tokens_BS.flatten(), positions_T)
        last = torch.full((), (length or end) - 1, device=tokens_BS.device) if self.rotary.asks_for_lengths else None
        rotary = self.rotary.tables(positions_T, hidden_TH.dtype, last_position=last)
        views = {window: self._view(cache, positions_BS, end, window) for window in self.windows}

        for layer, block in enumerate(self.blocks):

            def mix(normed_TH: Tensor, layer: int = layer, block: Block = block) -> Tensor:
                parts = block.attention.project(normed_TH, rotary[block.attention.window])
                query_BNSD, key_BKSD, value_BKSD = (
                    part.view(num_sequences, num_new, *part.shape[1:]).transpose(1, 2) for part in parts
                )
                mixed_BNSD = attend_cached(
                    query_BNSD,
                    cache.put(layer, key_BKSD, value_BKSD),
                    views[block.attention.window],
                    scale=self.model.score_scale,
                    softcap=self.model.attention_softcap,
                )
                return mixed_BNSD.transpose(1, 2).reshape(normed_TH.shape[0], -1)

            if rows_N is not None and block is self.blocks[-1]:
                hidden_TH = block.at(hidden_TH, rows_N, mix)
            else:
                output = block.attention.output
                hidden_TH = block.around(hidden_TH, lambda normed_TH: output(mix(normed_TH)))  # noqa: B023
        cache.length = end
        return hidden_TH if rows_N is not None else hidden_TH.view(num_sequences, num_new, -1)

    @staticmethod
    def _view(cache: KeyValueCache, positions_BS: Tensor | None, end: int, window: int | None) -> CachedView:
        if positions_BS is None:
            return view_of_cache(cache.length, end, window=window, device=cache.keys[0].device)
        return view_of_ragged_cache(positions_BS, cache.positions[:, :end], window=window)

    def outgrows(self, cache: KeyValueCache) -> bool:
        """Whether one position more would rotate all cached ones in another way (longrope), so that they must be run anew."""
        ropes = [rope for rope in self.rotary.frequencies if rope.scaling == "longrope"]
        return any(rope.original_max_positions == cache.length for rope in ropes)

    @torch.inference_mode()
    def logits(self, hidden_BSH: Tensor) -> Tensor:
        """[B, S, V] in fp32; the columns beyond the real vocabulary hold -inf."""
        # FinalNorm takes the layers' tuple and reads its first entry only.
        normed_TH = self.final_norm((hidden_BSH.flatten(0, 1), None, None, None))[0]
        return self.head.logits(normed_TH).float().view(*hidden_BSH.shape[:2], -1)
