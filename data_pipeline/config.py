"""Settings of the data side: what to prepare (CorpusConfig, TokenizerConfig, PrepareConfig) and what to train on (DataConfig).

Plain frozen dataclasses, quick to import; every rule among fields is checked here and nowhere else.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from conf.errors import ConfigError

DEFAULT_END_OF_DOCUMENT = "<|endoftext|>"
NUM_BYTE_SYMBOLS = 256
MAX_VOCAB_SIZE = 2**31 - 1  # ids are stored as int32 at most
BLEND_SLOTS = 10_000  # a blend is kept exactly within every block of this many samples


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where documents come from and how they are read."""

    name: str = "stdlib"
    """Name of the corpus; part of every document's id, and of the default output folder."""
    reader: Literal["source_tree", "text", "jsonl", "parquet", "hf"] = "source_tree"
    """Kind of input. source_tree: one file, one document, below folders; text: plain text files; jsonl, parquet: one row, one
    document; hf: a data set of the `datasets` library, by name or from a folder."""
    paths: tuple[str, ...] = ("stdlib:",)
    """Files, folders or glob patterns (for hf: data set names or folders). `stdlib:` is this Python's standard library."""
    suffixes: tuple[str, ...] = ()
    """Endings of the files to take from folders, compressed forms (.gz, .zst) included; empty: those usual for the reader."""
    exclude: tuple[str, ...] = ()
    """Patterns of file and folder names that are passed over, such as `__pycache__` or `test_*`."""
    text_field: str = "text"
    """Field or column that holds the text (jsonl, parquet, hf)."""
    document_separator: str | None = None
    """Text that parts a file into documents (text reader); a spelled-out `\\n` is a line end, so `\\n\\n` is a blank line.
    null: one file is one document."""
    encoding: str = "utf-8"
    """Encoding of text files; a byte-order mark of UTF-8 is removed. JSONL is UTF-8 by its definition."""
    undecodable: Literal["reject", "replace"] = "reject"
    """What happens to a file that breaks its encoding: set it aside, or put U+FFFD where bytes make no sense."""
    hf_config: str | None = None
    """Configuration of the hf data set; null: its default."""
    hf_split: str = "train"
    """Split of the hf data set to read; Longhaul holds out its own validation documents."""
    hf_revision: str | None = None
    """Commit or tag of the hf data set; null: the newest."""
    hf_streaming: bool = True
    """Read the hf data set as a stream, without a full local copy first."""

    def __post_init__(self) -> None:
        problems = []
        if not self.name or Path(self.name).name != self.name or self.name.startswith("."):
            problems.append(f"name={self.name!r}: must be usable as a folder name; give letters, digits, - or _")
        if not self.paths:
            problems.append("paths=[]: needs at least one file, folder or pattern; give paths=[/where/the/text/is]")
        if any(not path for path in self.paths):
            problems.append("paths: holds an empty path; remove it")
        if any(not suffix.startswith(".") for suffix in self.suffixes):
            problems.append(f"suffixes={list(self.suffixes)}: each must begin with a dot, such as .py")
        if not self.text_field:
            problems.append("text_field='': needs the name of the field that holds the text")
        if self.document_separator is not None and self.reader != "text":
            problems.append(f"document_separator: only for reader=text, got reader={self.reader}; set it to null")
        if self.document_separator == "":
            problems.append("document_separator='': must not be empty; set it to null for one document a file")
        if self.reader == "hf" and "stdlib:" in self.paths:
            problems.append("paths=[stdlib:]: not a Hugging Face data set; give its name or folder")
        if not _is_text_codec(self.encoding):
            problems.append(f"encoding={self.encoding!r}: Python knows no such text encoding; try utf-8")
        _raise_all(problems)


def _is_text_codec(name: str) -> bool:
    try:
        return codecs.lookup(name)._is_text_encoding
    except LookupError:
        return False


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer: an existing one, or a byte-level BPE trained on the corpus."""

    path: str | None = None
    """Folder of a Hugging Face tokenizer to use as it is; null: train one, with the settings below."""
    vocab_size: int = 8192
    """Entries of the vocabulary to train, special tokens included."""
    end_of_document: str | None = None
    """Token appended to every document; null: `<|endoftext|>` when training, the tokenizer's own `eos_token` with `path`."""
    extra_special_tokens: tuple[str, ...] = ()
    """Further special tokens to reserve when training, such as the marks of a chat template."""
    min_frequency: int = 2
    """Occurrences that a pair needs to be merged, when training."""
    training_bytes: int | None = 32 * 2**20
    """Bytes of text to train on, drawn evenly over the documents; null: all of it."""
    pretokenizer: Literal["gpt2", "llama3"] = "llama3"
    """Rule that cuts text into words before merging. llama3: digits in groups of three, apostrophes in any case; gpt2: digits
    in runs of any length."""
    engine: Literal["auto", "gigatoken", "hf"] = "auto"
    """Program that encodes. auto: gigatoken where it is installed and its ids equal those of Hugging Face on a sample of the
    corpus, else hf, and says which; gigatoken: an error where that does not hold."""

    def __post_init__(self) -> None:
        problems = []
        if self.path == "":
            problems.append("path='': needs the folder of a Hugging Face tokenizer; give tokenizer.path=FOLDER")
        if self.end_of_document == "":
            problems.append("end_of_document='': must not be empty; set it to null for the default")
        if self.path is None:
            problems += self._training_problems()
        elif self.extra_special_tokens:
            problems.append(
                f"extra_special_tokens={list(self.extra_special_tokens)}: only for a tokenizer that is trained; "
                f"path={self.path} is taken as it is, so leave them out"
            )
        _raise_all(problems)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Special tokens of a trained tokenizer, end-of-document first."""
        return (self.end_of_document or DEFAULT_END_OF_DOCUMENT, *self.extra_special_tokens)

    def _training_problems(self) -> list[str]:
        problems = []
        special = self.special_tokens
        least = NUM_BYTE_SYMBOLS + len(special)
        if not least <= self.vocab_size <= MAX_VOCAB_SIZE:
            problems.append(
                f"vocab_size={self.vocab_size}: needs at least {least} ({NUM_BYTE_SYMBOLS} bytes and {len(special)} special "
                f"tokens) and at most {MAX_VOCAB_SIZE}"
            )
        if len(set(special)) != len(special) or "" in special:
            problems.append(f"extra_special_tokens={list(self.extra_special_tokens)}: must be distinct and not empty")
        if self.min_frequency < 1:
            problems.append(f"min_frequency={self.min_frequency}: must be at least 1")
        if self.training_bytes is not None and self.training_bytes < 1:
            problems.append(f"training_bytes={self.training_bytes}: must be at least 1; null means the whole corpus")
        return problems


Verify = Literal["once", "full", "sizes"]
Phase = Literal["all", "read", "choose", "encode", "publish"]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """From documents to token shards: the root of `longhaul prepare`."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The documents."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer."""
    output: str | None = None
    """Folder of the prepared corpus; null: data/<corpus.name>."""
    deduplicate: bool = True
    """Drop documents whose text is equal to an earlier one."""
    held_out_fraction: float = 0.01
    """Share of the documents kept for validation, chosen by the hash of their text; 0: none."""
    shard_tokens: int = 2**28
    """Most tokens a shard holds; only a single longer document exceeds it."""
    min_document_bytes: int = 1
    """UTF-8 bytes below which a document is set aside."""
    workers: int | None = None
    """Processes that read and encode; null: one for every core this process may use. The result does not depend on it."""
    seed: int = 0
    """Seed of the choice of held-out documents and of the text to train the tokenizer on."""
    dry_run: bool = False
    """Tell what would be read and written, and write nothing."""
    phase: Phase = "all"
    """all: one process does everything; otherwise one of its phases, so that several machines share the work: read and encode
    in `parts`, choose (duplicates, tokenizer) and publish in one."""
    part: int = 0
    """Which part of the input a read or encode phase does, from 0."""
    parts: int = 1
    """Into how many parts these phases are split. The result does not depend on it."""

    def __post_init__(self) -> None:
        problems = []
        if self.parts < 1 or not 0 <= self.part < max(1, self.parts):
            problems.append(f"part={self.part}: must be from 0 to below parts={self.parts}")
        if self.parts > 1 and self.phase not in ("read", "encode"):
            problems.append(f"parts={self.parts}: phase={self.phase} is done in one; only read and encode are split")
        if not 0.0 <= self.held_out_fraction < 1.0:
            problems.append(f"held_out_fraction={self.held_out_fraction}: must be at least 0 and below 1; 0.01 is usual")
        if self.shard_tokens < 1024:
            problems.append(f"shard_tokens={self.shard_tokens}: must be at least 1024")
        if self.min_document_bytes < 1:
            problems.append(f"min_document_bytes={self.min_document_bytes}: must be at least 1; empty documents are never kept")
        if self.workers is not None and self.workers < 1:
            problems.append(f"workers={self.workers}: must be at least 1; null means all cores")
        if self.output is not None and not self.output.strip():
            problems.append("output='': needs a folder; set it to null for data/<corpus.name>")
        _raise_all(problems)

    @property
    def output_folder(self) -> Path:
        """Where the prepared corpus will lie."""
        return Path(self.output) if self.output is not None else Path("data") / self.corpus.name


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One prepared corpus of a blend."""

    path: str
    """Folder of a prepared corpus, as `longhaul prepare` left it."""
    weight: float = 1.0
    """Share of the samples drawn from it, relative to the other sources' weights."""
    name: str | None = None
    """Name in metrics and in the key of the sample order; null: the folder's last part."""

    def __post_init__(self) -> None:
        problems = []
        if not self.path.strip():
            problems.append("path='': needs the folder of a prepared corpus")
        if not (math.isfinite(self.weight) and self.weight > 0):
            problems.append(f"weight={self.weight}: must be a positive number; leave the source out to not use it")
        if self.name == "":
            problems.append("name='': must not be empty; set it to null for the folder's name")
        _raise_all(problems)

    @property
    def label(self) -> str:
        """The source's name: as given, or the folder's last part."""
        return self.name if self.name is not None else Path(self.path).resolve().name


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What pretraining reads."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(path="data/stdlib"),)
    """Prepared corpora and their weights."""
    sequence_length: int = 1024
    """Tokens of one sample."""
    document_mask: bool = True
    """Keep documents apart within a sample: positions restart, attention stays inside, the first token of a document is no
    target. False: one run of text, as in GPT-3."""
    max_epochs: float | None = None
    """Times that a source's text may be repeated in the planned run before it is an error; null: no limit."""
    verify: Verify = "once"
    """What is checked before a run. once: the hash of every file (about 1 GB a second) that was not hashed before, or whose
    size, time of change or inode is another than then; full: the hash of every file; sizes: only the files' sizes."""

    def __post_init__(self) -> None:
        problems = []
        if not self.sources:
            problems.append("sources=[]: needs at least one prepared corpus; give sources=[{path: data/stdlib}]")
        labels = [source.label for source in self.sources]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            problems.append(
                f"sources: the name {', '.join(twice)} occurs more than once; give each a name of its own: "
                "sources=[{path: ..., name: ...}, ...]"
            )
        if self.sequence_length < 1:
            problems.append(f"sequence_length={self.sequence_length}: must be at least 1 token")
        if self.max_epochs is not None and not self.max_epochs > 0:
            problems.append(f"max_epochs={self.max_epochs}: must be positive; null means no limit")
        total = sum(source.weight for source in self.sources)
        for source, slots in zip(self.sources, blend_quotas([source.weight for source in self.sources]), strict=True):
            if slots == 0:
                problems.append(
                    f"sources: weight={source.weight} of {source.label} is {source.weight / total:.2e} of all: 0 "
                    f"of the {BLEND_SLOTS} slots of a block; give it at least {total / BLEND_SLOTS:.3g} or leave it out"
                )
        _raise_all(problems)


def blend_quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Slots of a block of BLEND_SLOTS that each weight gets."""
    return quotas(weights, BLEND_SLOTS)


def quotas(weights: Sequence[float], slots: int) -> tuple[int, ...]:
    """`slots` in proportion to the weights, by the largest remainder; ties go to the earlier one."""
    total = math.fsum(weights)
    exact = [weight / total * slots for weight in weights]
    whole = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: whole[index] - exact[index])
    for index in by_remainder[: slots - sum(whole)]:
        whole[index] += 1
    return tuple(whole)
