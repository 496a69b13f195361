"""Code-like text with open brackets, in the style of Python, cut where the innermost one could be closed."""

from __future__ import annotations

import numpy as np

CLOSERS = (")", "]", "}")
DEPTHS = (1, 2, 3)
_NAMES = (
    "x", "n", "i", "a", "key", "name", "value", "data", "items", "args", "path", "text", "index", "result", "size", "line",
)  # fmt: skip
_ROUND, _SQUARE, _CURLY = range(3)


def draw_snippet(rng: np.random.Generator, *, kind: int, depth: int) -> str:
    """A text that ends with a word inside `depth` open brackets, the innermost to be closed by CLOSERS[kind].

    The bracket around it is of another kind, and brackets of all kinds were opened and closed before, so that neither the
    first nor the last one opened tells the answer.
    """
    kinds = [int(rng.integers(3)) for _ in range(depth - 2)]
    if depth > 1:
        kinds.append((kind + 1 + int(rng.integers(2))) % 3)
    kinds.append(kind)
    text = f"{_name(rng)} = "
    for around, own in zip((None, *kinds), kinds, strict=False):
        text += _before(rng, around) + _opening(rng, own)
    return text + _before(rng, kind) + _name(rng)


def _name(rng: np.random.Generator) -> str:
    return _NAMES[int(rng.integers(len(_NAMES)))]


def _opening(rng: np.random.Generator, kind: int) -> str:
    if kind == _CURLY:
        return "{"
    word = _name(rng) if kind == _ROUND or rng.random() < 0.5 else ""
    return f"{word}{'(' if kind == _ROUND else '['}"


def _before(rng: np.random.Generator, around: int | None) -> str:
    """What stands between a bracket of kind `around` and what comes next in it: often another element, sometimes a keyword."""
    if around is None:
        return ""
    text = "".join(f"{_label(rng, around)}{_element(rng)}, " for _ in range(int(rng.integers(2))))
    return text + _label(rng, around)


def _label(rng: np.random.Generator, around: int) -> str:
    if around == _CURLY:
        return f"{_name(rng)}: "
    return f"{_name(rng)}=" if around == _ROUND and rng.random() < 0.25 else ""


def _element(rng: np.random.Generator) -> str:
    """A word, or a whole pair of brackets."""
    forms = (_name(rng), f"{_name(rng)}({_name(rng)})", f"[{_name(rng)}, {_name(rng)}]", f"{{{_name(rng)}: {_name(rng)}}}")
    return forms[int(rng.integers(len(forms)))]
