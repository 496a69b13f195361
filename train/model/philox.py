"""Random numbers that can be sliced: element i of a stream is a function of the stream's key and of i, of nothing else.

Philox (Salmon et al. 2011) turns a counter into random words without those before it; numpy has it in C. Normals are made by
Box and Muller's method (1958), a pair from each 64-bit word: numpy's and torch's own cannot be entered in the middle.
Logarithm, sine and cosine are series of products and sums here: IEEE 754 leaves those no freedom, so that every CPU finds
the same bits, which the ones of a vector library do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import factorial, log, pi
from typing import TypeAlias

import numpy as np

INITIALISATION = 2
"""Version of the initial values, kept with a run: 1, up to its first commit, drew each tensor from torch's own generator."""

BLOCK_ELEMENTS = 1 << 15  # the dozen arrays of a block then stay in a core's cache
WORDS_OF_COUNTER = 4
ELEMENTS_OF_WORD = 2

Words: TypeAlias = np.ndarray  # uint64 [W]
Values: TypeAlias = np.ndarray  # fp32 [2 W]

_SQRT_HALF_BITS = 0x3F3504F3  # of the fp32 sqrt(1/2)
_ATANH = [2 / (2 * term + 1) for term in range(5)]  # of 2 atanh(s) / s = ln((1 + s) / (1 - s)) / s, in s^2
_SINE = [(-1) ** term / factorial(2 * term + 1) for term in range(5)]  # of sin(x) / x, in x^2
_COSINE = [(-1) ** term / factorial(2 * term) for term in range(5)]
_SIGN = np.uint32(1 << 31)


def elements(key: int, ranges: Iterable[range], make: Callable[[Words], Values]) -> Iterator[Values]:
    """The elements of the stream `key` in `ranges`, one range after the other, in blocks of at most BLOCK_ELEMENTS.

    `make` makes the two elements of each word.
    """
    stream = _Stream(key)
    words = np.empty(BLOCK_ELEMENTS // ELEMENTS_OF_WORD + 1, dtype=np.uint64)
    pieces: list[slice] = []  # of the elements of `words`, those that are asked for
    used = 0
    for wanted in ranges:
        first = wanted.start
        while first < wanted.stop:
            word, lead = divmod(first, ELEMENTS_OF_WORD)
            count = min(wanted.stop - first, (len(words) - used) * ELEMENTS_OF_WORD - lead)
            num_words = -(-(lead + count) // ELEMENTS_OF_WORD)
            words[used : used + num_words] = stream.words(word, num_words)
            pieces.append(slice(used * ELEMENTS_OF_WORD + lead, used * ELEMENTS_OF_WORD + lead + count))
            used, first = used + num_words, first + count
            if used == len(words):
                yield _taken(make(words), pieces)
                pieces, used = [], 0
    if used:
        yield _taken(make(words[:used]), pieces)


def _taken(values: Values, pieces: list[slice]) -> Values:
    return values[pieces[0]] if len(pieces) == 1 else np.concatenate([values[piece] for piece in pieces])


class _Stream:
    """The words of a key, from any place on."""

    def __init__(self, key: int) -> None:
        self._bits = np.random.Philox(key=key)
        self._next_counter = 0

    def words(self, first: int, count: int) -> Words:
        """Words [first, first + count): word w is number w % 4 of those that Philox makes of counter 1 + w // 4."""
        counter, lead = divmod(first, WORDS_OF_COUNTER)
        # Also where it would move by nothing: it drops what is left of the last counter's words.
        self._bits.advance((counter - self._next_counter) % (1 << 256))
        self._next_counter = counter - (-(lead + count) // WORDS_OF_COUNTER)
        return self._bits.random_raw(lead + count)[lead:]


def normal(words: Words, std: float) -> Values:
    """Two values of a normal around 0 from each word: its low half gives the radius, its high half the angle.

    The logarithm is of (n + 0.5) / 2^32, never of 0, so that the largest value is 6.8 standard deviations off.
    """
    halves = words.view(np.uint32).reshape(-1, 2)
    radius = _root_of_minus_log(np.ascontiguousarray(halves[:, 0]))
    radius *= np.float32(std)
    turns = np.ascontiguousarray(halves[:, 1])
    # The upper two bits are the signs, the other 30 an angle within a quarter turn around 0: with cosine c and sine s of it,
    # (c - s, c + s) is sqrt(2) long and lies anywhere in the first quadrant.
    angle = (turns << 2).view(np.int32).astype(np.float32)
    angle *= np.float32(pi / 4 / 2**31)
    square = angle * angle
    sine, cosine = _series(_SINE, square), _series(_COSINE, square)
    sine *= angle
    values = np.empty((len(words), 2), dtype=np.float32)
    np.subtract(cosine, sine, out=square)
    np.add(cosine, sine, out=cosine)
    for column, part, sign in ((0, square, turns & _SIGN), (1, cosine, (turns << 1) & _SIGN)):
        part *= radius
        np.bitwise_xor(part.view(np.uint32), sign, out=values.view(np.uint32)[:, column])
    return values.reshape(-1)


def uniform(words: Words, limit: float) -> Values:
    """Two values between -limit and limit from each word: one from its low half, one from its high half."""
    values = words.view(np.int32).astype(np.float32)
    values *= np.float32(limit / 2**31)
    return values


def _root_of_minus_log(numerators: np.ndarray) -> np.ndarray:
    """sqrt(-ln((n + 0.5) / 2^32)) of each n: fp32."""
    value = numerators.astype(np.float32)
    value += np.float32(0.5)
    bits = value.view(np.int32)
    # value = mantissa * 2^exponent with a mantissa between sqrt(1/2) and sqrt(2), whose logarithm is small.
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    bits -= exponent << 23
    value -= np.float32(1)
    value /= value + np.float32(2)
    log_mantissa = _series(_ATANH, value * value)
    log_mantissa *= value
    minus_log = (32 - exponent).astype(np.float32)
    minus_log *= np.float32(log(2))
    minus_log -= log_mantissa
    return np.sqrt(minus_log, out=minus_log)


def _series(coefficients: list[float], at: np.ndarray) -> np.ndarray:
    """The polynomial with these coefficients, the constant first."""
    *others, last = (np.float32(coefficient) for coefficient in coefficients)
    total = at * last
    for coefficient in reversed(others[1:]):
        total += coefficient
        total *= at
    total += others[0]
    return total
