"""The runs of a sweep: every combination of the values, each with a name of its own."""

from __future__ import annotations

from collections.abc import Sequence

from conf.compose import combinations


def named_combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the words that hold several values, with a run name of its own.

    Raises ConfigError for words that cannot be read.
    """
    return with_names(combinations(overrides))


def with_names(jobs: Sequence[Sequence[str]]) -> list[list[str]]:
    """The jobs, with numbers below a common run name unless their names differ already: no two may share a folder."""
    names = [_name_of(job) for job in jobs]
    if len(set(names)) == len(jobs):
        return [list(job) for job in jobs]
    numbered = []
    for number, (job, name) in enumerate(zip(jobs, names, strict=True)):
        quote = name[0] if name[0] in "'\"" else ""
        rest = [word for word in job if not _is_name(word)]
        numbered.append([*rest, f"run.name={quote}{name.strip(quote)}/{number:03d}{quote}"])
    return numbered


def _is_name(word: str) -> bool:
    return word.lstrip("+").startswith("run.name=")


def _name_of(job: Sequence[str]) -> str:
    """The run name among the words, as it is spelled there."""
    given = [word.partition("=")[2] for word in job if _is_name(word)]
    return (given[-1] if given else "") or "sweep"
