"""Small corpora for the tests of this folder: texts from a seeded vocabulary, and prepared folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from data_pipeline.config import CorpusConfig, PrepareConfig, TokenizerConfig
from data_pipeline.manifest import MANIFEST_FILE, Manifest, read_manifest
from data_pipeline.prepare import prepare

SYLLABLES = ("ka", "lo", "mi", "ter", "an", "\u00e9s", "qu", "ro", "ze", "th", "\u4e16", "ing", "7", "42")


def some_text(seed: int, words: int) -> str:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(SYLLABLES), size=(words, 3)).tolist()
    lengths = rng.integers(1, 4, size=words).tolist()
    made = ("".join(SYLLABLES[syllable] for syllable in row[:length]) for row, length in zip(drawn, lengths, strict=True))
    return " ".join(made) + "\n"


def some_texts(count: int, *, seed: int = 0) -> list[str]:
    """Texts of 1 to 60 words, all different."""
    rng = np.random.default_rng(seed)
    return [some_text(seed * 100_000 + number, int(rng.integers(1, 60))) for number in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def settings(path: Path, output: Path, **changes: object) -> PrepareConfig:
    """Settings for a JSONL file; `corpus` and `tokenizer` may be replaced as a whole."""
    base = PrepareConfig(
        corpus=CorpusConfig(name="tiny", reader="jsonl", paths=(str(path),)),
        tokenizer=TokenizerConfig(vocab_size=300, engine="hf"),
        output=str(output),
        held_out_fraction=0.1,
        shard_tokens=4096,
        workers=1,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def prepared(folder: Path, texts: list[str], **changes: object) -> Manifest:
    """Write `texts` and prepare them below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_jsonl(folder / "texts.jsonl", texts)
    manifest = prepare(settings(path, folder / "out", **changes))
    assert manifest is not None
    return manifest


def change_manifest(folder: Path, **changes: object) -> None:
    """Set fields of a manifest, and its fingerprint to fit: what a careful forger would do."""
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def reopened(manifest: Manifest) -> Manifest:
    return read_manifest(manifest.folder)
