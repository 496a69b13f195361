"""The programs that turn text into ids: Hugging Face `tokenizers`, which is the truth, and gigatoken where it is proven equal.

Shape letters: D documents of a batch, T tokens of all of them.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from conf.errors import UserError
from data_pipeline.tokenizer import Tokenizer

EngineName = Literal["gigatoken", "hf"]

# Texts on which tokenizers have been seen to differ: nothing, blanks at the ends and in runs, line ends of all kinds, digits,
# contractions, accents in both forms, joined emoji, digits that are not ASCII, ideographs, odd blanks, control characters.
HARD_TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "\r\n \r\n",
    " a",
    "a ",
    "\t\tif x:\n\n\n        return  y  \n",
    "x = 1234567890, 0x1F, 3.14e-10",
    "don't DON'T we'LL I'm y'all'd've",
    "e\u0301 \u00e9 \u1e9b\u0323 \ufb01",
    "\U0001f469\u200d\U0001f469\u200d\U0001f466 \U0001f1e9\U0001f1ea!",
    "\u0663\u0664\u0665 \u00b2\u00b3 \u2167 \u0967\u0968",
    "\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u3000\u00a0\u2003x\u200b\ufeff",
    "\x01\x7f\u0085\u2028\u2029",
    "___ --- === ### \\\\ \"\"\" ''' <|> <||>",
    "a" * 300,
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0627\u0644\u0633\u0644\u0627\u0645",
)


class Engine(Protocol):
    """Encodes documents."""

    def encode(self, texts_D: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts in a row, [T], and the number of each text's, int64 [D]. Nothing is put between them."""
        ...


class HuggingFaceEngine:
    """`tokenizers`, Hugging Face's own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend

    def encode(self, texts_D: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._backend.encode_batch_fast(list(texts_D), add_special_tokens=False)
        ids_D = [np.asarray(item.ids, dtype=np.int64) for item in encoded]
        counts_D = np.array([len(ids) for ids in ids_D], dtype=np.int64)
        return (np.concatenate(ids_D) if ids_D else np.empty(0, dtype=np.int64)), counts_D


class GigatokenEngine:
    """gigatoken, ten to fifty times as fast on one core."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import gigatoken

        content = json.loads(tokenizer.json)
        # It would take text that spells a special token for that token; without knowing them it encodes it as text.
        content["added_tokens"] = [token for token in content.get("added_tokens") or [] if not token.get("special")]
        self._backend = gigatoken.Tokenizer.from_json(json.dumps(content))

    def encode(self, texts_D: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        import awkward

        if not texts_D:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        encoded = self._backend.encode_batch(list(texts_D), parallel=False)
        return awkward.to_numpy(awkward.flatten(encoded)), awkward.to_numpy(awkward.num(encoded)).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """Which program encodes, and why."""

    name: EngineName
    """The program."""
    reason: str
    """Why this one."""
    megabytes_per_second: float
    """Its speed on the sample, on one core, in 10^6 bytes a second."""


def open_engine(name: EngineName, tokenizer: Tokenizer) -> Engine:
    """The engine of that name."""
    return HuggingFaceEngine(tokenizer) if name == "hf" else GigatokenEngine(tokenizer)


@functools.lru_cache(maxsize=1)
def cached_engine(name: EngineName, folder: Path) -> Engine:
    """The engine over the tokenizer in `folder`, opened once in each process."""
    return open_engine(name, Tokenizer(folder))


def choose_engine(tokenizer: Tokenizer, wanted: Literal["auto", "gigatoken", "hf"], *, sample: Sequence[str]) -> EngineChoice:
    """Choose the program for this tokenizer by encoding `sample` and HARD_TEXTS with both and comparing the ids.

    Raises UserError when gigatoken was asked for by name and is not installed, cannot read the tokenizer or gives other ids.
    """
    truth = HuggingFaceEngine(tokenizer)
    texts = [*sample, *HARD_TEXTS, *(f"a{token}b" for token in tokenizer.special_texts)]
    expected, hf_speed = _timed(truth, texts)
    if wanted == "hf":
        return EngineChoice(name="hf", reason="as asked", megabytes_per_second=hf_speed)
    objection, speed = _gigatoken_objection(tokenizer, texts, expected)
    if objection is None:
        size = sum(len(text) for text in sample)
        reason = f"ids equal to Hugging Face's on {len(sample)} documents ({size} characters) and {len(HARD_TEXTS)} hard texts"
        return EngineChoice(name="gigatoken", reason=reason, megabytes_per_second=speed)
    if wanted == "gigatoken":
        raise UserError(f"tokenizer.engine=gigatoken: {objection}; use tokenizer.engine=hf, or auto")
    return EngineChoice(name="hf", reason=f"gigatoken was not taken: {objection}", megabytes_per_second=hf_speed)


def _gigatoken_objection(tokenizer: Tokenizer, texts: Sequence[str], expected: Any) -> tuple[str | None, float]:
    """Why gigatoken cannot be used, or None; and its speed."""
    try:
        engine = GigatokenEngine(tokenizer)
        found, speed = _timed(engine, texts)
    except ImportError as error:
        return f"it is not installed ({error}): pip install gigatoken", 0.0
    # A panic in its Rust code arrives as an exception outside of Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return f"it cannot work with this tokenizer ({type(error).__name__}: {' '.join(str(error).split())[:200]})", 0.0
    different = _first_difference(found, expected)
    if different is None:
        return None, speed
    return f"its ids differ from Hugging Face's, first for the text {texts[different][:40]!r}", 0.0


def _first_difference(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> int | None:
    """Number of the first text whose ids differ."""
    if np.array_equal(found[1], expected[1]) and np.array_equal(found[0], expected[0]):
        return None
    pieces = [np.split(ids, np.cumsum(counts)[:-1]) for ids, counts in (found, expected)]
    return next(number for number, (one, other) in enumerate(zip(*pieces, strict=True)) if not np.array_equal(one, other))


def _timed(engine: Engine, texts: Sequence[str]) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """What the engine makes of `texts`, and its speed in 10^6 bytes a second."""
    size = sum(len(text.encode()) for text in texts)
    engine.encode(["warm up"])  # imports and caches are not the engine's speed
    start = time.perf_counter()
    result = engine.encode(texts)
    return result, size / 1e6 / max(time.perf_counter() - start, 1e-9)
