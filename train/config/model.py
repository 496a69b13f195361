"""The shape of a model. A family is a choice of these fields, never a branch on its name."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log, sqrt
from typing import Literal

from conf.errors import ConfigError
from train.config.families import FamilyName, family_problems


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    base: float = 10_000.0
    """Base of the rotary frequencies (theta)."""
    fraction: float = 1.0
    """Part of each head that is rotated, its first dimensions; the rest knows no position. GPT-NeoX has 0.25."""
    scaling: Literal["none", "linear", "dynamic", "yarn", "longrope", "llama3"] = "none"
    """Stretching to longer contexts: linear stretches all frequencies alike, llama3 (of Llama 3.1) and yarn the slow ones,
    longrope (of Phi 3) each by a factor of its own. dynamic begins beyond max_positions, where no model reads: as none."""
    factor: float = 8.0
    """linear, llama3, yarn: how many times (slow) frequencies are stretched; longrope: how many times the context is, which
    only attention_factor follows from; dynamic: written to an export."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original_max_positions / this are stretched fully."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_max_positions / this are left alone."""
    original_max_positions: int = 8192
    """llama3, yarn, longrope: context length in tokens that the unstretched model was trained at."""
    fast_turns: float = 32.0
    """yarn: pairs that turn at least this often within original_max_positions are left alone."""
    slow_turns: float = 1.0
    """yarn: pairs that turn at most this often within original_max_positions are stretched fully."""
    truncate: bool = True
    """yarn: whether the pairs where the stretching begins and is full are taken as whole numbers."""
    attention_factor: float | None = None
    """yarn, longrope: what cosine and sine are multiplied with; null: by the scaling's rule, for factor > 1, yarn
    0.1 ln(factor) + 1, longrope sqrt(1 + ln(factor) / ln(original_max_positions))."""
    short_factors: tuple[float, ...] = ()
    """longrope: what the frequency of each rotated pair is divided by in documents of up to original_max_positions tokens."""
    long_factors: tuple[float, ...] = ()
    """longrope: what the frequency of each rotated pair is divided by in longer documents."""

    def rotated_size(self, head_size: int) -> int:
        """How many dimensions of a head are rotated."""
        return int(head_size * self.fraction)

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied with.

        Peng et al. 2023 (YaRN), equation 22; Ding et al. 2024 (LongRoPE), as in transformers.
        """
        if self.scaling not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.scaling == "yarn":
            return 0.1 * log(self.factor) + 1
        return sqrt(1 + log(self.factor) / log(self.original_max_positions))

    def __post_init__(self) -> None:
        problems = self._scaling_problems()
        if self.base <= 1:
            problems.append(f"base={self.base}: must be above 1; Llama 2 has 10000, Llama 3 has 500000")
        if not 0 < self.fraction <= 1:
            problems.append(f"fraction={self.fraction}: must be above 0 and at most 1, which rotates whole heads")
        if problems:
            raise ConfigError(problems)

    def _scaling_problems(self) -> list[str]:
        problems = []
        if self.scaling != "none" and self.factor < 1:
            problems.append(f"factor={self.factor}: must be at least 1, which stretches nothing")
        if self.scaling in ("llama3", "yarn", "longrope") and self.original_max_positions < 2:
            problems.append(f"original_max_positions={self.original_max_positions}: must be at least 2 tokens")
        if self.scaling == "llama3" and not 0 < self.low_frequency_factor < self.high_frequency_factor:
            problems.append(
                f"low_frequency_factor={self.low_frequency_factor}: must be above 0 and below "
                f"high_frequency_factor={self.high_frequency_factor}; Llama 3.1 has 1 and 4"
            )
        if self.scaling == "yarn" and not 0 < self.slow_turns < self.fast_turns:
            problems.append(
                f"slow_turns={self.slow_turns}: must be above 0 and below fast_turns={self.fast_turns}; 1 and 32 are usual"
            )
        if self.attention_factor is not None and self.attention_factor <= 0:
            problems.append(f"attention_factor={self.attention_factor}: must be above 0; null takes the scaling's rule")
        for name in ("short_factors", "long_factors"):
            lowest = min(getattr(self, name), default=1.0)
            if lowest <= 0:
                problems.append(f"{name}: holds {lowest}; each must be above 0, 1 stretches nothing")
        return problems


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    family: FamilyName
    """Whose checkpoint names an export uses, which limits the fields below to what the family has; they alone set the
    computation. custom: any of them together, for a model that trains and generates but has no export."""
    num_layers: int
    """Number of decoder blocks."""
    hidden_size: int
    """Width of the residual stream."""
    num_heads: int
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of key-value heads (grouped-query attention); null: as many as query heads."""
    head_size: int | None = None
    """Width of one head; null: hidden_size / num_heads."""
    ffn_size: int
    """Inner width of the MLP; with a gate the width of each of gate and up."""
    max_positions: int
    """Longest context in tokens: rows of the learned position table, and the limit of data.sequence_length."""
    vocab_size: int | None = None
    """Number of token ids; null: that of the corpus's tokenizer."""
    vocab_multiple: int = 64
    """The embedding has rows up to the next multiple of this; the added ones are masked out of the logits."""
    labels: tuple[str, ...] = ()
    """Labels that the head tells apart, from the last token of a row; empty: a language model. With labels tied_head and
    logit_softcap, which are of the output matrix, change nothing."""
    positions: Literal["learned", "rotary"]
    """How a token knows its place: a learned table added to the embedding, or rotation of queries and keys."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary settings; read when positions=rotary."""
    local_rope: RopeConfig | None = None
    """Rotary settings of the layers with a window, as Gemma 3; null: rope, as all others."""
    norm: Literal["layer", "rms"]
    """LayerNorm (with bias) or RMSNorm (without), around the sublayers and before the head."""
    norm_epsilon: float = 1e-5
    """Added to the variance (or mean square) before the root."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Where a sublayer has its norm: on what it reads, on its output before that is added, or both, as Gemma 2."""
    norm_one_plus: bool = False
    """Whether norms multiply by 1 + weight, with weights that start from 0, as Gemma."""
    residual: Literal["sequential", "parallel", "parallel_shared"] = "sequential"
    """Whether the MLP reads what attention has added to, or the same as attention: parallel by a norm of its own, as
    GPT-NeoX, parallel_shared by the same norm, as Phi."""
    mlp: Literal["gelu", "gelu_exact", "swiglu", "geglu", "geglu_exact"]
    """GELU with two matrices, in tanh form, as GPT-2, or exact, as GPT-NeoX; SwiGLU, GeGLU (tanh form) or GeGLU with the
    exact GELU with three."""
    bias: bool
    """Whether linear layers have a bias; those of attention, unless the next two say otherwise."""
    qkv_bias: bool | None = None
    """Whether the query, key and value projections have one; null: as bias."""
    attention_output_bias: bool | None = None
    """Whether the attention's output projection has one; null: as bias."""
    qk_norm: bool = False
    """Whether each query and key head is RMS-normalised before it is rotated, as Qwen 3."""
    qk_norm_across_heads: bool = False
    """Whether qk_norm takes its mean square over all query (key) heads of a token together, with a weight for each of their
    dimensions, as OLMo 2."""
    embedding_scale: float = 1.0
    """What token embeddings are multiplied with; Gemma has the root of hidden_size."""
    logit_softcap: float | None = None
    """Bound on the logits, which become this x tanh(logit / this); null: none. Gemma 2 has 30."""
    tied_head: bool
    """Whether the output matrix is the embedding matrix."""
    dropout: float = 0.0
    """Probability of dropping in the embedding, the attention weights and the sublayer outputs."""
    window: int | None = None
    """Sliding window: tokens that a query sees at most, itself included; null: all before it."""
    window_pattern: str = "S"
    """Which layers have the window: letters repeated over the layers, S with (sliding), L without (long); SSSL is usual."""
    attention_scale: float | None = None
    """What the products of queries and keys are multiplied with; null: 1 / sqrt(head size)."""
    attention_softcap: float | None = None
    """Bound on attention scores, which become this x tanh(score / this); null: none. Gemma 2 has 50."""
    init_std: float = 0.02
    """Standard deviation of initial matrices; those that write to the residual get / sqrt(2 x num_layers)."""
    mup_base_width: int | None = None
    """hidden_size that learning rate and init_std were tuned at, to be carried over to this width (muP); null: no scaling."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator in the loss; 1e-4 is usual, 0 is off."""

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the query, key and value projections have a bias."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_attention_output_bias(self) -> bool:
        """Whether the attention's output projection has a bias."""
        return self.bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP has a gate beside its up-projection."""
        return self.mlp in ("swiglu", "geglu", "geglu_exact")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to vocab_multiple."""
        assert self.vocab_size is not None, "vocab_size is filled in from the corpus before a model is built"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def score_scale(self) -> float:
        """What the products of queries and keys are multiplied with."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query of this layer sees at most; None: all before it."""
        return self.window if self.window_pattern[layer % len(self.window_pattern)] == "S" else None

    @property
    def width_ratio(self) -> float:
        """How many times wider this model is than the one its settings were tuned at; 1 without muP."""
        return 1.0 if self.mup_base_width is None else self.hidden_size / self.mup_base_width

    def rope_of(self, window: int | None) -> RopeConfig | None:
        """Rotary settings of the layers with this window; None: their queries and keys are not rotated."""
        if self.positions == "learned":
            return None
        return self.rope if window is None or self.local_rope is None else self.local_rope

    def __post_init__(self) -> None:
        problems = []
        sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size", "ffn_size")
        for name in (*sizes, "max_positions", "vocab_size", "vocab_multiple", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}={value}: must be at least 1")
        if not problems:
            problems += self._shape_problems()
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout}: must be at least 0 and below 1")
        for name in ("norm_epsilon", "init_std", "embedding_scale"):
            if getattr(self, name) <= 0:
                problems.append(f"{name}={getattr(self, name)}: must be above 0")
        if self.mup_base_width is not None and self.mup_base_width < 1:
            problems.append(f"mup_base_width={self.mup_base_width}: must be at least 1; null turns the scaling off")
        if self.z_loss < 0:
            problems.append(f"z_loss={self.z_loss}: must not be negative; 0 turns it off")
        problems += self._attention_problems()
        problems += self._block_problems()
        problems += self._label_problems()
        problems = problems or family_problems(self)
        if problems:
            raise ConfigError(problems)

    def _attention_problems(self) -> list[str]:
        problems = []
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            problems.append(f"window_pattern={self.window_pattern}: must be made of S and L, such as SSSL")
        elif self.window is None and self.window_pattern != "S":
            problems.append(f"window_pattern={self.window_pattern}: needs the window that its S layers have; give window")
        if self.local_rope is not None and (self.window is None or self.positions != "rotary"):
            problems.append("local_rope: is of layers with a window and rotary positions; give window, or local_rope=null")
        if self.qk_norm_across_heads and not self.qk_norm:
            problems.append("qk_norm_across_heads=true: says how qk_norm is taken; give qk_norm=true, or leave it out")
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                problems.append(f"{name}={value}: must be above 0; null is the usual")
        return problems

    def _shape_problems(self) -> list[str]:
        problems = []
        if self.head_size is None and self.hidden_size % self.num_heads:
            problems.append(f"num_heads={self.num_heads}: must divide hidden_size={self.hidden_size}; or give head_size")
        elif self.positions == "rotary":
            problems += self._rotary_problems()
        if self.num_heads % self.kv_heads:
            problems.append(f"num_kv_heads={self.kv_heads}: must divide num_heads={self.num_heads}")
        return problems

    def _rotary_problems(self) -> list[str]:
        problems = []
        if self.head_dim % 2:
            problems.append(f"head_size={self.head_dim}: rotary positions need an even head size")
            return problems
        ropes = {"rope": self.rope} | ({} if self.local_rope is None else {"local_rope": self.local_rope})
        for name, rope in ropes.items():
            rotated = rope.rotated_size(self.head_dim)
            if rotated % 2 or rotated == 0:
                problems.append(
                    f"{name}.fraction={rope.fraction}: rotates {rotated} of head_size={self.head_dim}, which must be an even "
                    f"number above 0; 1 rotates whole heads"
                )
            for factors in ("short_factors", "long_factors") if rope.scaling == "longrope" else ():
                given = len(getattr(rope, factors))
                if given != rotated // 2:
                    problems.append(
                        f"{name}.{factors}: holds {given} numbers; scaling=longrope needs one for each of the {rotated // 2} "
                        f"pairs that are rotated of head_size={self.head_dim}"
                    )
        return problems

    def _block_problems(self) -> list[str]:
        problems = []
        if self.residual != "sequential" and self.norm_placement != "pre":
            problems.append(
                f"norm_placement={self.norm_placement}: residual={self.residual} has norms before its sublayers only; "
                f"take norm_placement=pre or residual=sequential"
            )
        return problems

    def _label_problems(self) -> list[str]:
        problems = []
        if len(self.labels) == 1:
            problems.append(f"labels={list(self.labels)}: a head tells at least 2 apart; give more, or none: a language model")
        if doubles := sorted({label for label in self.labels if self.labels.count(label) > 1}):
            problems.append(f"labels: hold {', '.join(doubles)} more than once; give each label one name of its own")
        if "" in self.labels:
            problems.append("labels: hold an empty name; give each label one that a report can show")
        return problems
