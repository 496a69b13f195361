"""The verb `compare`: its words, its settings, and where its page goes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from conf.compose import compose, validate
from conf.errors import ConfigError, UserError
from tools.compare.subjects import Named, Subject

NAMING_WORDS = ("run", "checkpoint")
LONGEST_NAME = 120  # of the page's folder; file systems end at 255 bytes


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    subjects: tuple[Named, ...] = ()
    """What is compared; the others are held against the first. Given as words of their own, in this order and as often as
    needed: run=FOLDER is a run as far as it has come, checkpoint=FOLDER one of its checkpoints or an imported one."""
    out: str | None = None
    """Folder for the page and its pictures; null: compare/A-vs-B below the working folder, by the names of the two."""
    curves: bool = True
    """Draw the curves; false: a page without them, in a moment."""
    resamples: int = 1000
    """Resamples of the examples that intervals and p-values are taken from; 0: neither."""
    confidence: float = 0.95
    """Share of such intervals that hold the true figure."""
    seed: int = 0
    """Seed of the resamples."""

    def __post_init__(self) -> None:
        problems = []
        if self.out == "":
            problems.append("out='': needs a folder; null takes compare/A-vs-B")
        if self.resamples < 0:
            problems.append(f"resamples={self.resamples}: must not be negative; 0 makes neither intervals nor tests")
        if not 0 < self.confidence < 1:
            problems.append(f"confidence={self.confidence}: must lie between 0 and 1, such as 0.95")
        if self.seed < 0:
            problems.append(f"seed={self.seed}: must not be negative")
        if problems:
            raise ConfigError(problems)


def compare(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """`longhaul compare`."""
    named = [word.partition("=") for word in overrides if word.partition("=")[0] in NAMING_WORDS]
    rest = [word for word in overrides if word.partition("=")[0] not in NAMING_WORDS]
    composed = compose("compare", rest, config_dir)
    if named:  # Hydra keeps only the last of several words of one name
        composed = replace(
            composed, tree=composed.tree | {"subjects": [{"kind": kind, "path": path} for kind, _, path in named]}
        )
    return run(validate(CompareConfig, composed))


def run(config: CompareConfig) -> int:
    """Compare, tell what was found and write the page; returns 0.

    Raises UserError for what is not there, damaged, or cannot be written.
    """
    from tools.compare.console import written
    from tools.compare.document import document
    from tools.compare.figures import Resampling
    from tools.compare.findings import find
    from tools.compare.subjects import read_subjects

    subjects = read_subjects(config.subjects)
    resampling = Resampling(resamples=config.resamples, confidence=config.confidence, seed=config.seed)
    findings = find(subjects, resampling)
    print("\n".join(written(findings)), flush=True)
    out = Path(config.out) if config.out is not None else default_folder(subjects)
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn = _drawn(subjects, out) if config.curves else None
        (out / "index.html").write_text(document(findings, drawn), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"out={out}: {error.filename or out} cannot be written ({error.strerror})") from None
    print(f"\npage  {out / 'index.html'}")
    return 0


def _drawn(subjects: Sequence[Subject], out: Path) -> list[str]:
    from tools.compare.overlays import make_charts
    from tools.curves import draw

    return [draw(chart, out) for chart in make_charts(subjects)]


def default_folder(subjects: Sequence[Subject]) -> Path:
    """compare/A-vs-B below the working folder, by the names that the subjects go by."""
    names = [re.sub(r"[^\w.-]+", "-", subject.name).strip("-.") or subject.letter for subject in subjects]
    return Path("compare") / "-vs-".join(names)[:LONGEST_NAME]
