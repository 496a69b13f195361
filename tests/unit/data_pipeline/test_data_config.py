"""The rules among the settings, the groups in conf/, and that reading them is quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conf.compose import compose, options, validate
from conf.errors import ConfigError
from data_pipeline.config import CorpusConfig, DataConfig, PrepareConfig, SourceConfig, TokenizerConfig


def test_defaults_of_the_yaml_are_those_of_the_dataclass() -> None:
    composed = validate(PrepareConfig, compose("prepare", []))
    assert composed == PrepareConfig(
        corpus=CorpusConfig(suffixes=(".py",), exclude=("site-packages", "dist-packages", "__pycache__"))
    )


@pytest.mark.parametrize("corpus", options("corpus"))
def test_every_corpus_group_composes(corpus: str) -> None:
    given = [] if corpus == "stdlib" else ["corpus.paths=[/somewhere]"]
    config = validate(PrepareConfig, compose("prepare", [f"corpus={corpus}", "corpus.name=mine", *given]))
    assert config.corpus.name == "mine" and config.output_folder.as_posix() == "data/mine"


def test_corpus_group_without_paths_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"corpus.paths=\[\]: needs at least one file"):
        validate(PrepareConfig, compose("prepare", ["corpus=jsonl"]))


def test_existing_tokenizer_needs_its_folder() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer.path='': needs the folder"):
        validate(PrepareConfig, compose("prepare", ["tokenizer=hf"]))
    assert validate(PrepareConfig, compose("prepare", ["tokenizer=hf", "tokenizer.path=/t"])).tokenizer.path == "/t"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CorpusConfig(name="a/b"), "name='a/b': must be usable as a folder name"),
        (lambda: CorpusConfig(name=".."), "name='..': must be usable"),
        (lambda: CorpusConfig(paths=("",)), "paths: holds an empty path"),
        (lambda: CorpusConfig(suffixes=("py",)), "suffixes=['py']: each must begin with a dot"),
        (lambda: CorpusConfig(text_field=""), "text_field='': needs the name"),
        (lambda: CorpusConfig(document_separator="\n"), "document_separator: only for reader=text"),
        (lambda: CorpusConfig(reader="text", document_separator=""), "document_separator='': must not be empty"),
        (lambda: CorpusConfig(reader="hf"), "not a Hugging Face data set"),
        (lambda: CorpusConfig(encoding="utf-9"), "encoding='utf-9': Python knows no such text encoding"),
        (lambda: CorpusConfig(encoding="base64"), "encoding='base64': Python knows no such text encoding"),
        (lambda: TokenizerConfig(vocab_size=256), "vocab_size=256: needs at least 257 (256 bytes and 1 special tokens)"),
        (lambda: TokenizerConfig(end_of_document=""), "end_of_document='': must not be empty"),
        (lambda: TokenizerConfig(extra_special_tokens=("<a>", "<a>")), "must be distinct"),
        (lambda: TokenizerConfig(path="x", extra_special_tokens=("<a>",)), "only for a tokenizer that is trained"),
        (lambda: TokenizerConfig(min_frequency=0), "min_frequency=0: must be at least 1"),
        (lambda: TokenizerConfig(training_bytes=0), "training_bytes=0: must be at least 1"),
        (lambda: PrepareConfig(held_out_fraction=1.0), "held_out_fraction=1.0: must be at least 0 and below 1"),
        (lambda: PrepareConfig(shard_tokens=1), "shard_tokens=1: must be at least 1024"),
        (lambda: PrepareConfig(min_document_bytes=0), "min_document_bytes=0: must be at least 1"),
        (lambda: PrepareConfig(workers=0), "workers=0: must be at least 1"),
        (lambda: PrepareConfig(output=" "), "output='': needs a folder"),
        (lambda: SourceConfig(path=""), "path='': needs the folder"),
        (lambda: SourceConfig(path="a", weight=float("nan")), "weight=nan: must be a positive number"),
        (lambda: SourceConfig(path="a", name=""), "name='': must not be empty"),
        (lambda: DataConfig(sources=()), "sources=[]: needs at least one"),
        (lambda: DataConfig(sequence_length=0), "sequence_length=0: must be at least 1"),
        (lambda: DataConfig(max_epochs=0), "max_epochs=0: must be positive"),
        (
            lambda: DataConfig(sources=(SourceConfig(path="x/a"), SourceConfig(path="y/a"))),
            "the name a occurs more than once; give each a name of its own",
        ),
        (
            lambda: DataConfig(sources=(SourceConfig(path="a"), SourceConfig(path="b", weight=1e-5))),
            "weight=1e-05 of b is 1.00e-05 of all: 0 of the 10000 slots",
        ),
    ],
)
def test_rules(make: object, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()  # type: ignore[operator]
    assert text in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        PrepareConfig(held_out_fraction=2, shard_tokens=0, workers=-1, min_document_bytes=-1)
    assert len(caught.value.problems) == 4


def test_reading_settings_and_manifests_imports_nothing_heavy() -> None:
    heavy = ("torch", "tokenizers", "transformers", "datasets", "megatron", "pyarrow", "gigatoken", "awkward")
    modules = "data_pipeline.config, data_pipeline.facts, data_pipeline.sampler, data_pipeline.prepare"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
