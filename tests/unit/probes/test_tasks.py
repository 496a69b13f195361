"""The made-up tasks: what is right in them is right, nothing but knowledge helps, and they are the same every time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.manifest import Manifest
from data_pipeline.tokenizer import Tokenizer
from tests.unit.data_pipeline.corpora import prepared
from train.config.training import ProbeName
from train.probes import CHANCE, Probe, make_probes, tasks
from train.probes.snippets import CLOSERS, DEPTHS, draw_snippet
from train.probes.tasks import COPIES, REPEATS, SNIPPETS, NotAvailable, copying, induction, ordinary_ids

NAMES: tuple[ProbeName, ...] = ("copying", "induction", "brackets")
VOCAB, LENGTH = 300, 64
ALL = np.ones(VOCAB, dtype=np.int64)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A corpus of code-like text, and its tokenizer."""
    rng = np.random.default_rng(0)
    lines = [
        f"{draw_snippet(rng, kind=kind, depth=2)}{end}\n"
        for kind in range(3)
        for end in (")", "]", "})", "):")
        for _ in range(20)
    ]
    return prepared(tmp_path_factory.mktemp("code"), lines)


@pytest.fixture(scope="module")
def probes(code: Manifest) -> dict[str, Probe]:
    made, missing = make_probes(NAMES, code.tokenizer_path, counts_V=ALL, sequence_length=LENGTH)
    assert missing == []
    return {probe.name: probe for probe in made}


def questions(probe: Probe) -> list[list[int]]:
    """What a model has read when each question is asked."""
    pairs = zip(probe.sequence_P.tolist(), probe.place_P.tolist(), strict=True)
    return [probe.tokens_NS[sequence, : place + 1].tolist() for sequence, place in pairs]


def share_right(probe: Probe, logits_PV: np.ndarray) -> float:
    """What a model with these logits would get."""
    log_probability_PV = logits_PV - np.log(np.exp(logits_PV).sum(axis=1, keepdims=True))
    options_PO = np.take_along_axis(log_probability_PV, probe.options_PO, axis=1)
    return float(probe.score(options_PO, logits_PV.argmax(axis=1)).mean())


def test_copying_asks_for_what_stood_as_far_before(probes: dict[str, Probe]) -> None:
    probe, lengths = probes["copying"], []
    assert probe.tokens_NS.shape == (COPIES, LENGTH)
    for number, row in enumerate(probe.tokens_NS.tolist()):
        asked = probe.sequence_P == number
        half = int(asked.sum()) + 1
        assert row[:half] == row[half : 2 * half]
        assert probe.place_P[asked].tolist() == list(range(half, 2 * half - 1)), "the first is announced by nothing"
        assert probe.options_PO[asked, 0].tolist() == row[half + 1 : 2 * half]
        assert probe.first_place_P[asked].tolist() == list(range(half - 1))
        lengths.append(half)
    assert min(lengths) == 4 and max(lengths) == LENGTH // 2 and len(set(lengths)) > COPIES // 2


def test_induction_asks_for_what_followed_the_same_token(probes: dict[str, Probe]) -> None:
    probe, distances = probes["induction"], []
    for read, (right,) in zip(questions(probe), probe.options_PO.tolist(), strict=True):
        places = [place for place, token in enumerate(read[:-1]) if token == read[-1]]
        assert len(places) == 1 and read[places[0] + 1] == right and read.count(right) == 1
        distances.append(len(read) - 1 - places[0])
    assert np.array_equal(probe.tokens_NS[probe.sequence_P, probe.first_place_P], probe.tokens_NS[:, -1])
    assert np.array_equal(probe.tokens_NS[probe.sequence_P, probe.first_place_P + 1], probe.options_PO[:, 0])
    assert len(distances) == REPEATS
    assert min(distances) == 2 and max(distances) == LENGTH - 1 and len(set(distances)) > 50


def test_brackets_ask_for_the_closer_of_the_innermost_one(probes: dict[str, Probe], code: Manifest) -> None:
    probe, tokenizer, cells = probes["brackets"], Tokenizer(code.tokenizer_path), Counter()
    for read, options, groups in zip(questions(probe), probe.options_PO, probe.group_PO, strict=True):
        text, opened = tokenizer.decode(read), []
        for sign in text:
            if sign in "([{":
                opened.append("([{".index(sign))
            elif sign in CLOSERS:
                assert opened.pop() == CLOSERS.index(sign), text
        cells[opened[-1], len(opened)] += 1
        assert text[-1].isalnum() and (len(opened) == 1 or opened[-1] != opened[-2])
        for option, group in zip(options.tolist(), groups.tolist(), strict=True):
            begins = tokenizer.decode([option])[0]
            assert begins == CLOSERS[(opened[-1] + group) % 3], "group 0 is the right closer"
    assert cells == {(kind, depth): SNIPPETS for kind in range(3) for depth in DEPTHS}
    assert len(set(map(tuple, questions(probe)))) == len(probe.place_P), "no text twice"


def test_the_same_every_time_and_another_for_another_length(probes: dict[str, Probe], code: Manifest) -> None:
    again, _ = make_probes(NAMES, code.tokenizer_path, counts_V=ALL, sequence_length=LENGTH)
    for probe in again:
        assert np.array_equal(probe.tokens_NS, probes[probe.name].tokens_NS), probe.name
        assert np.array_equal(probe.options_PO, probes[probe.name].options_PO), probe.name
    shorter, _ = make_probes(NAMES, code.tokenizer_path, counts_V=ALL, sequence_length=32)
    assert all(probe.tokens_NS.shape[1] <= 32 for probe in shorter)
    longer, _ = make_probes(NAMES, code.tokenizer_path, counts_V=ALL, sequence_length=8192)
    assert all(probe.tokens_NS.shape[1] <= 128 for probe in longer), "a whole long context would cost as much as an evaluation"


def test_only_ordinary_tokens(code: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(code.tokenizer_path)
    made, _ = make_probes(NAMES, code.tokenizer_path, counts_V=ALL[:280], sequence_length=LENGTH)
    for probe in made:
        used = {*probe.tokens_NS.flatten().tolist(), *probe.options_PO.flatten().tolist()}
        assert max(used) < 280 and not used & tokenizer.special_ids, probe.name
    ids = ordinary_ids(tokenizer, ALL)
    assert all(tokenizer.decode([number]).isprintable() for number in ids)
    counts_V = np.arange(VOCAB)
    counts_V[ids[3]] = 0
    assert ordinary_ids(tokenizer, counts_V).tolist() == [number for number in ids if number != ids[3]], (
        "never seen, never asked"
    )
    monkeypatch.setattr(tasks, "MOST_IDS", 20)
    assert ordinary_ids(tokenizer, counts_V).tolist() == ids[-20:].tolist(), "the most frequent ones"


@pytest.mark.parametrize("name", NAMES)
def test_knowing_nothing_is_chance(probes: dict[str, Probe], name: ProbeName) -> None:
    probe, rng = probes[name], np.random.default_rng(1)
    shares = [share_right(probe, rng.normal(size=(len(probe.place_P), VOCAB))) for _ in range(20)]
    assert abs(np.mean(shares) - CHANCE[name]) < 0.03
    preference = np.tile(rng.normal(size=VOCAB), (len(probe.place_P), 1))
    assert abs(share_right(probe, preference) - CHANCE[name]) < 0.03, "to prefer some tokens is no knowledge"


def test_a_tie_is_no_answer(probes: dict[str, Probe]) -> None:
    """Logits in bf16 are often equal, and the first of them would be taken for the likeliest."""
    probe = probes["brackets"]
    one_each = np.full(probe.options_PO.shape, -np.inf)
    for row, groups in enumerate(probe.group_PO):
        for group in range(3):
            one_each[row, np.flatnonzero(groups == group)[0]] = -1.0
    nothing = np.zeros(len(probe.place_P))
    assert not probe.score(one_each, nothing).any()
    assert probe.score(one_each + 0.01 * (probe.group_PO == 0), nothing).all()


def test_rules_that_know_the_answer(probes: dict[str, Probe], code: Manifest) -> None:
    """A model that looks for the last time it read this token, and one that keeps a stack of brackets."""
    for name in ("copying", "induction"):
        logits_PV = np.zeros((len(probes[name].place_P), VOCAB))
        for row, read in enumerate(questions(probes[name])):
            earlier = [place for place in range(len(read) - 1) if read[place] == read[-1]]
            logits_PV[row, read[earlier[-1] + 1]] = 5.0
        assert share_right(probes[name], logits_PV) == 1.0
    probe, tokenizer = probes["brackets"], Tokenizer(code.tokenizer_path)
    logits_PV = np.zeros((len(probe.place_P), VOCAB))
    for row, read in enumerate(questions(probe)):
        opened: list[str] = []
        for sign in tokenizer.decode(read):
            opened = [*opened, sign] if sign in "([{" else opened[:-1] if sign in CLOSERS else opened
        logits_PV[row, tokenizer.encode(CLOSERS["([{".index(opened[-1])])[0]] = 9.0
    assert share_right(probe, logits_PV) == 1.0


def test_parts_are_the_whole(probes: dict[str, Probe]) -> None:
    probe = probes["copying"]
    parts = [probe.of(first, first + 5) for first in range(0, COPIES, 5)]
    assert sum(len(part.place_P) for part in parts) == len(probe.place_P)
    assert [row for part in parts for row in questions(part)] == questions(probe)
    assert np.array_equal(np.concatenate([part.options_PO for part in parts]), probe.options_PO)


@pytest.mark.parametrize("make", [copying, induction])
def test_what_is_impossible_is_said(make: type, tmp_path: Path) -> None:
    with pytest.raises(NotAvailable, match="needs sequences of 8 tokens, data.sequence_length is 7"):
        make(np.arange(1, 100), 7)
    with pytest.raises(NotAvailable, match="needs 16 tokens of printable text, the held-out text has 15"):
        make(np.arange(15), 64)


def test_a_tokenizer_that_merges_a_closer_with_the_word_before(code: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, text: original(self, text)[:-2] + [7] if text[-1] in CLOSERS else original(self, text)
    )
    made, missing = make_probes(NAMES, code.tokenizer_path, counts_V=ALL, sequence_length=LENGTH)
    assert [probe.name for probe in made] == ["copying", "induction"]
    assert missing == ["brackets: the tokenizer does not keep a closing bracket apart from the word before it"]


def test_what_a_run_cannot_have_is_told(code: Manifest, tmp_path: Path) -> None:
    made, missing = make_probes(("brackets", "copying"), code.tokenizer_path, counts_V=ALL, sequence_length=8)
    assert [probe.name for probe in made] == ["copying"]
    assert missing == ["brackets: its texts do not fit into data.sequence_length=8 tokens"]
    _, missing = make_probes(("brackets",), code.tokenizer_path, counts_V=ALL[:100], sequence_length=64)
    assert missing == ["brackets: its texts need token ids beyond model.vocab_size=100"]
    _, missing = make_probes(("brackets",), code.tokenizer_path, counts_V=ALL[:20], sequence_length=64)
    assert missing == ["brackets: the tokenizer has no token that begins with ]"]
    made, missing = make_probes(NAMES, tmp_path, counts_V=ALL, sequence_length=64)
    assert made == [] and missing[0].startswith(f"copying, induction, brackets: {tmp_path}: holds no tokenizer.json")
    assert make_probes((), tmp_path, counts_V=ALL, sequence_length=64) == ([], [])
