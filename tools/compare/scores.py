"""Which evaluations two subjects have in common, and what is left over, with the reason."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from conf.errors import UserError
from tools.compare.figures import Compared, Resampling, compare_examples, set_otherwise, title_of
from tools.compare.subjects import Subject
from train.checkpoint.manifest import MANIFEST, file_facts
from train.scores import selection
from train.scores.record import EVALUATION_FILE, Evaluation, Score

LACKING = "What {} lacks is made by"
NOTHING_IN_COMMON = "They have no evaluation in common; each is evaluated by"


@dataclass(frozen=True, kw_only=True)
class NotCompared:
    """An evaluation that only one has, or that is not of the same examples."""

    title: str
    reason: str
    first: Mapping[str, Score] = field(default_factory=dict)
    second: Mapping[str, Score] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ScoreComparison:
    """All evaluations of two subjects."""

    first: Subject
    second: Subject
    compared: tuple[Compared, ...] = ()
    not_compared: tuple[NotCompared, ...] = ()

    @property
    def lacking(self) -> list[Subject]:
        """Those that have not all evaluations of the other."""
        sides = ((self.first, "first"), (self.second, "second"))
        return [subject for subject, side in sides if any(not getattr(left, side) for left in self.not_compared)]


def evaluations_of(subject: Subject) -> list[Evaluation]:
    """Newest first: of a checkpoint its own, of a run those of the newest checkpoint that has any.

    Raises UserError for one that is damaged.
    """
    if subject.until is None:
        return selection.of_run(subject.evaluations_root)
    assert subject.checkpoint is not None, "a subject with a step is a checkpoint"
    digest = file_facts(subject.checkpoint / MANIFEST).sha256
    return selection.of_checkpoint(subject.evaluations_root, manifest_hash=digest, step=subject.until)


def compare_scores(first: Subject, second: Subject, resampling: Resampling) -> ScoreComparison:
    """Hold the evaluations of `second` against those of `first`. Raises UserError for one that is damaged."""
    mine, others = _by_content(evaluations_of(first)), _by_content(evaluations_of(second))
    compared: list[Compared] = []
    left: list[NotCompared] = []
    common = [key for key in mine if key in others]
    for key in tqdm(common, desc=f"comparing {second.letter}", unit=" evaluations", leave=False, disable=None):
        # Those that were made with the most alike settings; of these the newest, since min keeps the first of equals.
        pairs = itertools.product(mine.pop(key), others.pop(key))
        one, other = min(pairs, key=lambda pair: len(set_otherwise(*pair)))
        try:
            compared.append(compare_examples(one, other, resampling))
        except UserError as error:
            left.append(NotCompared(title=title_of(one), reason=str(error), first=one.scores, second=other.scores))
    left += _unmatched([found[0] for found in mine.values()], [found[0] for found in others.values()], (first, second))
    return ScoreComparison(first=first, second=second, compared=tuple(compared), not_compared=tuple(left))


def _by_content(evaluations: Sequence[Evaluation]) -> dict[tuple[str, str, str], list[Evaluation]]:
    """Name, kind and data -> the evaluations of it, newest first. Raises UserError for one that does not tell its data."""
    found: dict[tuple[str, str, str], list[Evaluation]] = {}
    for one in evaluations:
        try:
            found.setdefault((one.name, one.kind, one.data_hash), []).append(one)
        except (KeyError, TypeError) as error:
            path = f"{one.folder}/{EVALUATION_FILE}"
            raise UserError(f"{path}: damaged, its data lack {error}; remove the folder, and evaluate again") from None
    return found


def _unmatched(
    mine: Sequence[Evaluation], others: Sequence[Evaluation], subjects: tuple[Subject, Subject]
) -> list[NotCompared]:
    """What has no counterpart, with the nearest thing to one."""
    waiting = list(others)
    left = []
    for one in mine:
        other = next((other for other in waiting if other.name == one.name), None)
        if other is None:
            left.append(NotCompared(title=title_of(one), reason=_only(subjects[0], one), first=one.scores))
            continue
        waiting.remove(other)
        if one.kind != other.kind:
            reason = f"another kind: {one.kind} and {other.kind}"
        else:
            reason = f"other data: {_data_text(one)} and {_data_text(other)}"
        left.append(NotCompared(title=title_of(one), reason=reason, first=one.scores, second=other.scores))
    left += [NotCompared(title=title_of(one), reason=_only(subjects[1], one), second=one.scores) for one in waiting]
    return left


def _only(has: Subject, one: Evaluation) -> str:
    return f"only {has.letter} was evaluated on {_data_text(one) or 'these data'}"


def evaluate_command(subject: Subject) -> str:
    """What makes an evaluation of the subject; of a run, of its newest checkpoint."""
    task = getattr(subject.settings, "task", None)
    measured = task is None or task.kind != "preference"  # by its own task, on what it held out
    words = "" if measured else " task=generation 'task.data=[{path: FILE}]'"
    return f"longhaul evaluate checkpoint={subject.folder}{words}"


def _data_text(evaluation: Evaluation) -> str:
    """Names, the beginnings of their hashes, and the limit where only a part was read."""
    told = []
    for entry in evaluation.data:
        digest, _, limit = str(entry["hash"]).partition(":")
        told.append(f"{entry['name']} ({digest[:8]}{f', the first {limit}' if limit else ''})")
    return ", ".join(told)
