"""The model definition: embedding, blocks, final norm, head with its loss, as a list of layers.

Every layer takes and returns one tuple of fixed-shape tensors, so that the same list runs in one process, under ZeRO, or
cut into pipeline stages:

    (tokens [T] int64 | hidden [T, H], labels [T] int64, positions [T] int64, document bounds [max bounds] int32,
     and for preferences what the reference gives each document [max bounds] fp32)

Shapes: B sequences, S positions, T = B x S tokens batch-major, H hidden, N query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import ConfigError
from train.model.adapters import problems_of
from train.model.attention import Attend, Needs, choose
from train.model.attention.layout import sequence_bounds
from train.model.blueprint import Blueprint
from train.model.crossings import own_draws, own_rows, replicated
from train.model.empty import EmptyEmbedding
from train.model.float8 import check_device
from train.model.heads import ClassificationHead, LossHead
from train.model.layers import GatedMLP, Norm, NormAcrossHeads, PlainMLP
from train.model.logical import LogicalTensor, tag
from train.model.lora import freeze
from train.model.preference import PreferenceHead
from train.model.recompute import trained
from train.model.rotary import Rotary, last_positions, rotate
from train.model.tensor_parallel import expand_linear, reduce_linear, vocab_embedding

State: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a micro-batch is to be read: sequences of one length, documents kept apart or not."""

    sequence_length: int
    document_mask: bool


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What the blocks of one micro-batch share, by a layer's window: attention over its documents, and the rotary tables."""

    attend: dict[int | None, Attend]
    rotary: dict[int | None, tuple[Tensor, Tensor] | None]
    """None where queries and keys are not rotated."""


class Deriver:
    """Computes `Derived` once a micro-batch: the blocks of a process ask with the same tensors one after another.

    Raises UserError when attention is asked from a kernel that cannot compute it.
    """

    def __init__(self, blueprint: Blueprint, reading: Reading) -> None:
        model = blueprint.model
        self.blueprint = blueprint
        self.rotary = Rotary(model)
        self.windows = dict.fromkeys(model.window_of(number) for number in range(model.num_layers))
        self.read_as(reading)

    def read_as(self, reading: Reading) -> None:
        """Read the micro-batches to come in another way."""
        self.reading = reading
        self._asked: tuple[Tensor, Tensor, torch.dtype] | None = None
        self._answer: Derived | None = None
        self.needs = {window: attention_needs(self.blueprint, reading, window) for window in self.windows}
        self.backends = {window: choose(self.blueprint.kernels.attention, needs) for window, needs in self.needs.items()}

    def derive(self, positions_T: Tensor, document_bounds: Tensor, dtype: torch.dtype) -> Derived:
        """The mask and tables of a micro-batch; computed anew only for tensors other than the last ones."""
        # The tensors are held, so that identity cannot be that of a freed one.
        if self._asked and self._asked[0] is positions_T and self._asked[1] is document_bounds and self._asked[2] == dtype:
            return self._answer
        with torch.no_grad():
            attend = {}
            for window, backend in self.backends.items():
                needs = replace(self.needs[window], dtype=dtype)
                layout = backend.lay_out(needs, document_bounds, positions_T.shape[0])
                attend[window] = Attend(backend=backend, needs=needs, layout=layout)
            last_T = self._last_positions(positions_T, document_bounds) if self.rotary.asks_for_lengths else None
            rotary = self.rotary.tables(positions_T, dtype, last_position=last_T)
        self._asked, self._answer = (positions_T, document_bounds, dtype), Derived(attend=attend, rotary=rotary)
        return self._answer

    def _last_positions(self, positions_T: Tensor, document_bounds: Tensor) -> Tensor:
        """The last position of what each token is read in, its document or its sequence: [T]."""
        if not self.reading.document_mask:
            length = self.reading.sequence_length
            document_bounds = sequence_bounds(positions_T.shape[0], length, document_bounds.device)
        return last_positions(positions_T, document_bounds)

    def attention_line(self) -> str:
        """Which backends compute attention, for a person."""
        names = {window: backend.name for window, backend in self.backends.items()}
        if len(set(names.values())) == 1:
            return next(iter(names.values()))
        return ", ".join(f"{name} ({f'window {window}' if window else 'full'})" for window, name in names.items())


def attention_needs(blueprint: Blueprint, reading: Reading, window: int | None) -> Needs:
    """What the layers with `window` ask of attention on this rank."""
    model, ranks = blueprint.model, blueprint.tensor.size
    return Needs(
        num_heads=model.num_heads // ranks,
        kv_heads=model.kv_heads // ranks,
        head_size=model.head_dim,
        sequence_length=reading.sequence_length,
        packed=reading.document_mask,
        # A window as long as the sequence is none, and leaves more kernels to choose from.
        window=window if window is not None and window < reading.sequence_length else None,
        scale=model.score_scale,
        softcap=model.attention_softcap,
        dropout=model.dropout,
        dtype=blueprint.dtype,
        device=blueprint.device,
    )


class Embedding(nn.Module):
    """Token embedding, and the learned positions of models that have them."""

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        model = blueprint.model
        self.dropout, self.scale = model.dropout, model.embedding_scale
        self.neftune_alpha = blueprint.neftune_alpha
        self.tensor = blueprint.tensor
        self.tokens = vocab_embedding("embedding.tokens", blueprint)
        self.positions = None
        if model.positions == "learned":
            self.positions = EmptyEmbedding(model.max_positions, model.hidden_size)
            shape = (model.max_positions, model.hidden_size)
            tag(self.positions.weight, LogicalTensor(name="embedding.positions.weight", shape=shape))

    def embed(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """[T] ids and positions -> [T, H]."""
        hidden_TH = self.tokens(tokens_T)
        if self.scale != 1:
            hidden_TH = hidden_TH * self.scale
        if self.positions is not None:
            table = replicated(self.positions.weight, self.tensor, partial=False)
            hidden_TH = hidden_TH + F.embedding(own_rows(positions_T, self.tensor), table)
        return F.dropout(hidden_TH, self.dropout, self.training and self.dropout > 0)

    def forward(self, state: State) -> State:
        """Replace the tokens of the tuple by their hidden states."""
        tokens_T, labels_T, positions_T, bounds, *more = state
        hidden_TH = self.embed(tokens_T, positions_T)
        if self.training and self.neftune_alpha is not None:
            hidden_TH = hidden_TH + self._noise(hidden_TH, positions_T, bounds)
        return hidden_TH, labels_T, positions_T, bounds, *more

    def _noise(self, hidden_TH: Tensor, positions_T: Tensor, bounds: Tensor) -> Tensor:
        """Uniform within alpha / sqrt(L x H), L the tokens of the row that a token is of, whatever shares its sequence.

        NEFTune, Jain et al. 2023; in TRL L is the length of the padded batch.
        """
        length_T = own_rows(last_positions(positions_T, bounds) + 1, self.tensor)
        strength_T1 = self.neftune_alpha / (length_T * hidden_TH.shape[1]).sqrt().unsqueeze(1)
        return torch.empty_like(hidden_TH).uniform_(-1, 1) * strength_T1.to(hidden_TH.dtype)


class Attention(nn.Module):
    """Self-attention with fused query-key-value rows, grouped by key-value head: [K, N/K queries, key, value, D]."""

    def __init__(self, name: str, number: int, blueprint: Blueprint) -> None:
        super().__init__()
        model = blueprint.model
        self.window = model.window_of(number)
        self.kv_heads, self.head_dim = model.kv_heads // blueprint.tensor.size, model.head_dim
        self.name, self.tensor = name, blueprint.tensor
        self.queries_per_kv = model.num_heads // model.kv_heads
        self.dropout = model.dropout
        self.qkv = expand_linear(
            f"{name}.qkv", (model.kv_heads, self.queries_per_kv + 2, model.head_dim), blueprint, bias=model.has_qkv_bias
        )
        self.query_norm = _norm_of_heads(f"{name}.query_norm", model.num_heads, blueprint)
        self.key_norm = _norm_of_heads(f"{name}.key_norm", model.kv_heads, blueprint)
        self.output = reduce_linear(
            f"{name}.output", model.num_heads * model.head_dim, blueprint, bias=model.has_attention_output_bias
        )

    def project(self, hidden_TH: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, N, D], keys and values [T, K, D]; queries and keys normalised and turned by their positions."""
        rows = self.qkv(hidden_TH).unflatten(1, (self.kv_heads, self.queries_per_kv + 2, self.head_dim))
        query_TND = self.query_norm(rows[:, :, :-2].flatten(1, 2))
        key_TKD, value_TKD = self.key_norm(rows[:, :, -2]), rows[:, :, -1]
        if rotary is not None:
            query_TND, key_TKD = rotate(query_TND, *rotary), rotate(key_TKD, *rotary)
        return query_TND, key_TKD, value_TKD

    def forward(self, hidden_TH: Tensor, derived: Derived) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.output(self.mix(hidden_TH, derived))

    def mix(self, hidden_TH: Tensor, derived: Derived) -> Tensor:
        """The values that each position has gathered, before the output projection: [T, N x D]."""
        query_TND, key_TKD, value_TKD = self.project(hidden_TH, derived.rotary[self.window])
        dropout = self.dropout if self.training else 0.0
        with own_draws(self.tensor, self.name, dropout=dropout):
            mixed_TND = derived.attend[self.window](query_TND, key_TKD, value_TKD, dropout=dropout)
        return mixed_TND.flatten(1)


def _norm_of_heads(name: str, num_heads: int, blueprint: Blueprint) -> nn.Module:
    """The norm of queries or keys [T, N, D]; an identity where the model has none."""
    if not blueprint.model.qk_norm:
        return nn.Identity()
    if blueprint.model.qk_norm_across_heads:
        return NormAcrossHeads(name, num_heads, blueprint)
    return Norm(name, blueprint, of_heads=True)


class Block(nn.Module):
    """Decoder block: attention and MLP, each added to the residual stream; one after the other, or side by side.

    A norm that the model has not is an identity.
    """

    def __init__(self, number: int, blueprint: Blueprint, deriver: Deriver) -> None:
        super().__init__()
        name, model = f"blocks.{number}", blueprint.model
        self.dropout, self.residual = model.dropout, model.residual
        self.deriver = deriver

        def norm(sublayer: str, present: bool) -> nn.Module:
            return Norm(f"{name}.{sublayer}", blueprint) if present else nn.Identity()

        before, after = model.norm_placement != "post", model.norm_placement != "pre"
        self.attention_norm = norm("attention_norm", before)
        self.attention = Attention(f"{name}.attention", number, blueprint)
        self.attention_post_norm = norm("attention_post_norm", after)
        self.mlp_norm = norm("mlp_norm", before and model.residual != "parallel_shared")
        self.mlp = (GatedMLP if model.gated_mlp else PlainMLP)(f"{name}.mlp", blueprint)
        self.mlp_post_norm = norm("mlp_post_norm", after)
        self.run = trained(self.body, blueprint.kernels)

    def body(self, hidden_TH: Tensor, derived: Derived) -> Tensor:
        """The block's arithmetic in training: [T, H] -> [T, H]."""
        return self.around(hidden_TH, lambda normed_TH: self.attention(normed_TH, derived))

    def around(self, hidden_TH: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """The block's arithmetic around any `attention` [T, H] -> [T, H]; a cached one attends over other keys."""
        normed_TH = self.attention_norm(hidden_TH)
        attended_TH = hidden_TH + self._drop(self.attention_post_norm(attention(normed_TH)))
        if self.residual == "sequential":
            normed_TH = self.mlp_norm(attended_TH)
        elif self.residual == "parallel":
            normed_TH = self.mlp_norm(hidden_TH)
        return attended_TH + self._drop(self.mlp_post_norm(self.mlp(normed_TH)))

    def at(self, hidden_TH: Tensor, rows_N: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
        """The block's output at some rows alone: [N, H]. Behind attention nothing looks at another row.

        `mix`: normed hidden states [T, H] -> what `Attention.mix` gives of them.
        """
        mixed_TX = mix(self.attention_norm(hidden_TH))
        return self.around(hidden_TH[rows_N], lambda _: self.attention.output(mixed_TX[rows_N]))

    def forward(self, state: State) -> State:
        """Advance the hidden states of the tuple by one block."""
        hidden_TH, labels_T, positions_T, bounds, *more = state
        derived = self.deriver.derive(positions_T, bounds, hidden_TH.dtype)
        return self.run(hidden_TH, derived), labels_T, positions_T, bounds, *more

    def _drop(self, update_TH: Tensor) -> Tensor:
        return F.dropout(update_TH, self.dropout, self.training) if self.dropout else update_TH


class FinalNorm(Norm):
    """The norm before the head."""

    def forward(self, state: State) -> State:
        """Normalise the hidden states of the tuple."""
        hidden_TH, *more = state
        return super().forward(hidden_TH), *more


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One entry of the model: its name, how to build it, and the attribute that holds a weight tied to `tied_key`."""

    name: str
    build: Callable[[], nn.Module]
    tied_key: str | None = None
    tied_weight: str | None = None


def build_layers(blueprint: Blueprint, reading: Reading) -> list[Layer]:
    """THE model: its layers in order, each built when asked, so that a stage builds only its own.

    Their parameters lie on the meta device: `materialise` gives them memory. Products in 8-bit floats are of the blocks
    between the first and the last. Raises UserError when the device has none, and ConfigError when a pattern of
    adapters or of frozen tensors fits nothing.
    """
    model = blueprint.model
    if problems := problems_of(model, lora=blueprint.lora, frozen=blueprint.frozen):
        raise ConfigError(problems)
    if blueprint.float8 is not None:
        check_device(blueprint.device, blueprint.float8)
    deriver = Deriver(blueprint, reading)

    def made(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            with torch.device("meta"):
                return freeze(make(), blueprint)

        return build

    tied = "embedding" if model.tied_head and not model.labels else None
    layers = [
        Layer(name="embedding", build=made(lambda: Embedding(blueprint)), tied_key=tied, tied_weight=tied and "tokens.weight")
    ]
    for number in range(model.num_layers):
        inner = 0 < number < model.num_layers - 1
        plan = blueprint if inner else replace(blueprint, float8=None)
        layers.append(Layer(name=f"blocks.{number}", build=made(partial(Block, number, plan, deriver))))
    layers.append(Layer(name="final_norm", build=made(lambda: FinalNorm("final_norm", blueprint))))
    head = ClassificationHead if model.labels else PreferenceHead if blueprint.preference else LossHead
    layers.append(Layer(name="head", build=made(lambda: head(blueprint)), tied_key=tied, tied_weight=tied and "output.weight"))
    return layers


def materialise(module: nn.Module, make: Callable[[nn.Parameter], Tensor]) -> None:
    """Give each parameter of `module` that lies on meta the tensor that `make` makes for it; ties, marks and freezes stay."""
    for parameter in module.parameters():
        if parameter.is_meta:
            filled = nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)
            filled.__dict__.update(parameter.__dict__)
            torch.utils.swap_tensors(parameter, filled)


class Decoder(nn.Module):
    """The layers in one process, one after another; every parameter is tagged with its logical tensor, and lies on meta."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.names = [layer.name for layer in layers]
        tied: dict[str, nn.Parameter] = {}
        for layer in layers:
            module = layer.build()
            if layer.tied_key is not None:
                owner_name, _, attribute = layer.tied_weight.rpartition(".")
                owner = module.get_submodule(owner_name)
                tied.setdefault(layer.tied_key, getattr(owner, attribute))
                setattr(owner, attribute, tied[layer.tied_key])
            self.add_module(layer.name.replace(".", "_"), module)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers in order."""
        return [getattr(self, name.replace(".", "_")) for name in self.names]

    @property
    def blocks(self) -> list[Block]:
        """The decoder blocks in order."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    @property
    def attention_line(self) -> str:
        """Which backends compute attention, for a person."""
        return self.blocks[0].deriver.attention_line()

    @property
    def reading(self) -> Reading:
        """How micro-batches are read."""
        return self.blocks[0].deriver.reading

    @property
    def vocab_size(self) -> int:
        """Ids that are real; the head of a language model may have more columns."""
        return self.layers[-1].vocab_size

    def read_as(self, reading: Reading) -> None:
        """Read the micro-batches to come in another way; the weights stay."""
        for block in self.blocks:
            block.deriver.read_as(reading)

    def forward(self, *state: Tensor) -> tuple:
        """(objective, loss, targets) of a micro-batch, and the sums of the head's figures: see the heads' `forward`."""
        for layer in self.layers:
            state = layer(state)
        return state

    def logits(self, tokens_T: Tensor, positions_T: Tensor, bounds: Tensor) -> Tensor:
        """[T, V], or one for each label, of a micro-batch, in the model's dtype."""
        state = (tokens_T, tokens_T, positions_T, bounds)
        for layer in self.layers[:-1]:
            state = layer(state)
        return self.layers[-1].logits(state[0])
