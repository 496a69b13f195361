"""Words and sentences of text in any script, and what is known of the language it is in."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import regex

# Scripts that put no blanks between words; a character is what comes closest to a word without a dictionary. By script
# extensions, since the long-vowel mark of Katakana and others are shared between scripts.
_UNSPACED = "".join(rf"\p{{scx={script}}}" for script in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar"))
_LANGUAGES = {"zho": "zh", "chi": "zh", "cmn": "zh", "jpn": "ja", "kor": "ko", "eng": "en", "english": "en"}


def words(text: str) -> list[str]:
    """Words of the text in lower case, without punctuation and symbols.

    A word is a run of letters, marks and digits; in Han, Hiragana, Katakana, Thai, Lao, Khmer and Myanmar script it is one
    character with its marks. Of ASCII text these are rouge_score's own. Composed and decomposed letters are alike (NFC).
    """
    return _word_pattern().findall(unicodedata.normalize("NFC", text).lower())


def answer_words(text: str) -> list[str]:
    """As `words`, but what is not punctuation stays: runs between blanks, and single characters of unspaced scripts."""
    bare = _punctuation_pattern().sub("", unicodedata.normalize("NFC", text).lower())
    return _answer_pattern().findall(bare)


def sentences(text: str) -> list[str]:
    """Sentences of the text: its lines; where it has only one, what lies between the marks that end a sentence.

    Such marks are those of any script (Unicode's Sentence_Terminal, with closing quotes and brackets behind them); full stop,
    exclamation and question mark of ASCII count only before a blank, as in "3.14". An abbreviation before a blank ends one.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1:
        return lines
    return [part.strip() for part in _sentence_pattern().findall(text) if part.strip()]


def language_code(language: str | None) -> str:
    """Two letters for the languages that are treated on their own: zh for zh, zh-CN, zh_Hans, zho, cmn; "" for None."""
    base = re.split("[-_]", (language or "").lower())[0]
    return _LANGUAGES.get(base, base)


# The package is imported where it is first needed, and the patterns are compiled once: 30 ms that loss and accuracy save.


@cache
def _word_pattern() -> regex.Pattern[str]:
    import regex

    word = r"[\p{L}\p{M}\p{N}]"
    return regex.compile(rf"[[{_UNSPACED}]&&{word}]\p{{M}}*|[{word}--[{_UNSPACED}]]+", regex.V1)


@cache
def _answer_pattern() -> regex.Pattern[str]:
    import regex

    return regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[\S--[{_UNSPACED}]]+", regex.V1)


@cache
def _punctuation_pattern() -> regex.Pattern[str]:
    import regex

    # Punctuation of ASCII holds symbols, such as $ and +, that Unicode does not call punctuation.
    return regex.compile(r"""[\p{P}$+<=>^`|~]""")


@cache
def _sentence_pattern() -> regex.Pattern[str]:
    import regex

    closing = r"""[\p{Pe}\p{Pf}"']*"""
    return regex.compile(rf"(?s).+?(?:[.!?]{closing}(?=\s)|[\p{{Sentence_Terminal}}--[.!?]]+{closing}|$)", regex.V1)
