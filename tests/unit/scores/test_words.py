"""Words and sentences of any script."""

from __future__ import annotations

import random
import string

import pytest
from rouge_score import tokenize

from train.scores.words import answer_words, language_code, sentences, words


def test_words_of_ascii_are_rouge_scores_own() -> None:
    generator = random.Random(0)
    for _ in range(200):
        text = "".join(generator.choices(string.printable, k=60))
        assert words(text) == tokenize.tokenize(text, None), text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Привет, МИР!", ["привет", "мир"]),
        ("नमस्ते दुनिया।", ["नमस्ते", "दुनिया"]),
        ("مرحبا، بالعالم؟", ["مرحبا", "بالعالم"]),
        ("iPhone手机12号", ["iphone", "手", "机", "12", "号"]),
        ("ラーメンを々", list("ラーメンを々")),
        ("えーーと", list("えーーと")),
        ("ชั้นดี", ["ชั้", "น", "ดี"]),
        ("မြန်မာ ສະບາຍ ខ្មែរ", ["မြ", "န်", "မာ", "ສ", "ະ", "ບ", "າ", "ຍ", "ខ្", "មែ", "រ"]),
        ("안녕 세상", ["안녕", "세상"]),
        ("Cafe\u0301 CAFÉ", ["café", "café"]),
        ("½ x² №5", ["½", "x²", "5"]),
        ("", []),
        ("…！？ 🙂", []),
    ],
)
def test_words_of_other_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("北京 大学", list("北京大学")),
        ("「東京」（日本）。", list("東京日本")),
        ("C++ costs $5.00!", ["c", "costs", "500"]),
        ("iPhone 15手机", ["iphone", "15", "手", "机"]),
        ("abc🙂字", ["abc🙂", "字"]),
        ("、。", []),
    ],
)
def test_words_of_answers(text: str, expected: list[str]) -> None:
    assert answer_words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two!  Three", ["One.", "Two!", "Three"]),
        ('Pi is 3.14. "Yes?" (No.) end', ["Pi is 3.14.", '"Yes?"', "(No.)", "end"]),
        ("Wait... what?! Yes", ["Wait...", "what?!", "Yes"]),
        ("他说：“你好！”走了。。再见", ["他说：“你好！”", "走了。。", "再见"]),
        ("एक। दो।तीन", ["एक।", "दो।", "तीन"]),
        ("هل؟ نعم۔ لا", ["هل؟", "نعم۔", "لا"]),
        ("One. Two\nThree", ["One. Two", "Three"]),
        ("\n\nOne. Two\n \n", ["One.", "Two"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_a_code_of_two_letters() -> None:
    codes = {"zh": "zh", "zh-Hant-TW": "zh", "cmn": "zh", "jpn": "ja", "ko_KR": "ko", "English": "en", "de": "de", "": ""}
    assert {code: language_code(code) for code in codes} == codes
    assert language_code(None) == ""
