"""Stop texts are never partly shown; samples share one console."""

from __future__ import annotations

import io

import pytest

from train.inference.generation import Continuation
from train.inference.text import Console, StopFilter


def _run(pieces, stop):
    """What is shown after each piece, what was held back at the end, and whether a stop was met."""
    each = StopFilter(stop)
    shown = [each.push(piece) for piece in pieces]
    return shown, each.flush(), each.stopped


@pytest.mark.parametrize(
    ("text", "stop", "visible"),
    [
        ("one END two", ("END",), "one "),
        ("one EN two", ("END",), "one EN two"),
        ("aaab", ("aab",), "a"),
        ("ababac rest", ("abac",), "ab"),
        ("first second", ("second", "st s"), "fir"),
        ("xyz", ("xyz", "y"), "x"),
        ("ends with EN", ("END",), "ends with EN"),
        ("no stops at all", (), "no stops at all"),
        ("naïve 日本", ("日本",), "naïve "),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_text_before_the_stop_whatever_the_pieces(text, stop, visible, size):
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    shown, held, stopped = _run(pieces, stop)
    if stop == ("xyz", "y") and size >= 3:
        visible = ""  # both are there at once: the one that begins first
    assert "".join(shown) + held == visible
    assert stopped == (visible != text)
    so_far = ""
    for piece in shown:  # nothing that begins a stop text was shown before it was known not to be one
        so_far += piece
        assert visible.startswith(so_far)


def test_ordinary_text_is_not_held_back():
    shown, held, _ = _run(["abc", "def"], ("\n\n",))
    assert (shown, held) == (["abc", "def"], "")


class _Letters:
    def push(self, token_id):
        return chr(token_id)


def test_a_continuation_ends_at_the_end_of_document_and_shows_what_was_held():
    continuation = Continuation(_Letters(), stop=("bcd",), ends=[0])
    assert [continuation.push(ord(letter)) for letter in "abc"] == ["a", "", ""]
    assert continuation.push(0) == "bc"
    assert continuation.finished
    assert continuation.push(ord("d")) == ""
    assert continuation.num_tokens == 4


def test_a_continuation_ends_at_a_stop_text():
    continuation = Continuation(_Letters(), stop=("bc",))
    assert "".join(continuation.push(ord(letter)) for letter in "abcd") == "a"
    assert continuation.finished
    assert continuation.num_tokens == 3


def test_one_sample_grows_live():
    output = io.StringIO()
    console = Console(output, 1)
    console.show(0, "grow")
    assert output.getvalue() == "grow"
    console.show(0, "ing")
    console.finish(0)
    assert output.getvalue() == "growing\n"


def test_samples_follow_one_another():
    output = io.StringIO()
    console = Console(output, 3)
    for sample, text in ((1, "b1"), (0, "a1"), (2, "c"), (1, "b2")):
        console.show(sample, text)
    assert output.getvalue() == "--- sample 1 of 3 ---\na1"
    console.finish(2)
    console.finish(0)
    assert output.getvalue().endswith("a1\n--- sample 2 of 3 ---\nb1b2")
    console.show(1, "!")
    console.finish(1)
    assert output.getvalue().endswith("b1b2!\n--- sample 3 of 3 ---\nc\n")


def test_nothing_is_shown_before_its_end_when_not_live():
    output = io.StringIO()
    console = Console(output, 1, live=False)
    console.show(0, "text")
    assert output.getvalue() == ""
    console.finish(0)
    assert output.getvalue() == "text\n"
