"""What a run must know of its corpora before it starts: sizes, tokenizer, identity. Read from manifests alone; torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.errors import ConfigError, UserError
from data_pipeline.config import DataConfig, blend_quotas
from data_pipeline.io import sha256_of_texts
from data_pipeline.manifest import Manifest, read_manifest


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """One source of the blend."""

    name: str
    """Its name in metrics and in the sample order."""
    path: Path
    """Its folder."""
    share: float
    """Share of the samples, from 0 to 1, as the blend keeps it."""
    train_tokens: int
    """Tokens to train on."""
    validation_tokens: int
    """Held-out tokens."""
    train_windows: int
    """Training samples in one epoch."""
    validation_windows: int
    """Validation samples; the last may be padded."""
    bytes_per_token: float
    """UTF-8 bytes of text for each token."""

    def epochs(self, total_samples: int) -> float:
        """Times that this source is read in a run of so many samples."""
        return total_samples * self.share / self.train_windows


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """All sources together."""

    sources: tuple[SourceFacts, ...]
    """The sources, in the order of the configuration."""
    vocab_size: int
    """Ids that the shared tokenizer can produce."""
    eod_id: int
    """Id of end-of-document."""
    tokenizer_path: Path
    """Folder of the tokenizer, in Hugging Face's format."""
    tokenizer_sha256: str
    """Hash of the tokenizer."""
    documents_per_sample: int
    """Most documents that one sample touches; the fixed length of document bounds follows from it."""
    fingerprint: str
    """Identity of the data and of how it is cut and blended; the seed is not part of it."""
    manifests: tuple[Manifest, ...]
    """Of the sources, in their order: read once, and handed to whoever needs more of them."""

    @property
    def train_tokens(self) -> int:
        """Tokens to train on, over all sources."""
        return sum(source.train_tokens for source in self.sources)

    @property
    def validation_tokens(self) -> int:
        """Held-out tokens, over all sources."""
        return sum(source.validation_tokens for source in self.sources)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token of the blend."""
        return sum(source.share * source.bytes_per_token for source in self.sources)


def read_sources(config: DataConfig) -> tuple[Manifest, ...]:
    """The manifests of all sources, in order.

    Raises UserError for the first source that is missing or damaged, and when the sources do not share one tokenizer.
    """
    manifests = tuple(read_manifest(source.path) for source in config.sources)
    first = manifests[0]
    for manifest in manifests[1:]:
        if (manifest.tokenizer_sha256, manifest.eod_id) != (first.tokenizer_sha256, first.eod_id):
            raise UserError(
                f"sources {first.folder} and {manifest.folder} have different tokenizers ({_tokenizer_words(first)}; "
                f"{_tokenizer_words(manifest)}); prepare one of them again with the other's tokenizer: "
                f"longhaul prepare tokenizer=hf tokenizer.path={first.tokenizer_path} ..."
            )
    return manifests


def inspect_sources(config: DataConfig) -> CorpusFacts:
    """Read the manifests of all sources.

    Raises UserError for a source that is missing, damaged, too short for one sample, or of another tokenizer.
    """
    manifests = read_sources(config)
    quotas = blend_quotas([source.weight for source in config.sources])
    length = config.sequence_length
    sources = tuple(
        SourceFacts(
            name=source.label,
            path=manifest.folder,
            share=quota / sum(quotas),
            train_tokens=manifest.num_tokens("train"),
            validation_tokens=manifest.num_tokens("validation"),
            train_windows=train_windows(manifest, length),
            validation_windows=validation_windows(manifest, length),
            bytes_per_token=manifest.bytes_per_token,
        )
        for source, manifest, quota in zip(config.sources, manifests, quotas, strict=True)
    )
    first = manifests[0]
    return CorpusFacts(
        sources=sources,
        vocab_size=first.vocab_size,
        eod_id=first.eod_id,
        tokenizer_path=first.tokenizer_path,
        tokenizer_sha256=first.tokenizer_sha256,
        documents_per_sample=documents_per_sample(config, manifests),
        fingerprint=fingerprint_of(config, manifests),
        manifests=manifests,
    )


def verify_sources(config: DataConfig, manifests: Sequence[Manifest], *, run_dir: Path | None = None) -> None:
    """Check every file of every source as `verify` says. run_dir: takes the record of a corpus whose own folder does not.

    Raises UserError naming the files of the first source that fail.
    """
    for manifest in manifests:
        fallback = None if run_dir is None else run_dir / f"verified-{manifest.sha256[:12]}.json"
        manifest.verify(config.verify, fallback=fallback)


def check_epochs(config: DataConfig, facts: CorpusFacts, *, total_samples: int) -> dict[str, float]:
    """Epochs of every source, by name, in a run of so many samples.

    Raises ConfigError naming every source that is repeated more often than `max_epochs`.
    """
    epochs = {source.name: source.epochs(total_samples) for source in facts.sources}
    if config.max_epochs is not None:
        problems = [
            f"data.max_epochs={config.max_epochs:g}: the run reads {source.name} {epochs[source.name]:.2f} times "
            f"({total_samples} samples, {source.share:.2%} of them from its {source.train_windows}); train on fewer tokens, "
            "prepare more text, lower its weight or raise data.max_epochs"
            for source in facts.sources
            if epochs[source.name] > config.max_epochs
        ]
        if problems:
            raise ConfigError(problems)
    return epochs


def train_windows(manifest: Manifest, sequence_length: int) -> int:
    """Complete training samples; each needs one token more, its last label. Raises UserError when there is none."""
    tokens = manifest.num_tokens("train")
    windows = (tokens - 1) // sequence_length
    if windows < 1:
        raise UserError(
            f"{manifest.folder}: its {tokens} training tokens make no sample of data.sequence_length={sequence_length} tokens "
            "and one more; shorten data.sequence_length or prepare more text"
        )
    return windows


def validation_windows(manifest: Manifest, sequence_length: int) -> int:
    """Samples that hold every held-out token but the first as a target; the last may be padded."""
    return max(0, -(-(manifest.num_tokens("validation") - 1) // sequence_length))


def documents_per_sample(config: DataConfig, manifests: Sequence[Manifest]) -> int:
    """Most documents that one sample touches, over all sources and both splits, and one for the padding of validation.

    Both splits share it, so that every batch of a run has tensors of the same shape.
    """
    if not config.document_mask:
        return 1
    return max(manifest.max_documents(config.sequence_length) for manifest in manifests) + 1


def fingerprint_of(config: DataConfig, manifests: Sequence[Manifest], *, seed: int | None = None) -> str:
    """Identity of the data as a run reads it: contents, blend, sample length, document mask and, if given, the seed."""
    parts = [f"sequence_length={config.sequence_length}", f"document_mask={config.document_mask}", f"seed={seed}"]
    quotas = blend_quotas([source.weight for source in config.sources])
    # By name: the order of the sources in the configuration does not change the samples.
    parts += sorted(
        f"{source.label} {quota} {manifest.fingerprint}"
        for source, manifest, quota in zip(config.sources, manifests, quotas, strict=True)
    )
    return sha256_of_texts(parts)


def _tokenizer_words(manifest: Manifest) -> str:
    return f"{manifest.vocab_size} ids, end of document {manifest.eod_id}, hash {manifest.tokenizer_sha256[:12]}"
