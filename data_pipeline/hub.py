"""Data sets of the `datasets` library. Its only importer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.config import CorpusConfig
from data_pipeline.inputs import Unit

SAVED_DATASET_FILES = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves
ROWS_PER_UNIT = 100_000  # of a data set that is on disk; a stream is cut where its own files end


def dataset_units(corpus: CorpusConfig) -> tuple[Unit, ...]:
    """One unit for every shard of every data set. Raises UserError when one cannot be opened."""
    units: list[Unit] = []
    for name in corpus.paths:
        dataset = _open(corpus, name)
        shards = dataset.num_shards if corpus.hf_streaming else max(1, -(-dataset.num_rows // ROWS_PER_UNIT))
        units += [
            Unit(number=len(units) + shard, dataset=name, dataset_shard=shard, dataset_shards=shards) for shard in range(shards)
        ]
    return tuple(units)


def dataset_rows(corpus: CorpusConfig, unit: Unit) -> Iterator[dict[str, Any]]:
    """The rows of one shard of a data set, in order."""
    dataset = _open(corpus, str(unit.dataset))
    yield from dataset.shard(num_shards=unit.dataset_shards, index=unit.dataset_shard, contiguous=True)


def named_rows(name: str, *, config: str | None, split: str, revision: str | None) -> Iterator[dict[str, Any]]:
    """The rows of one split of a data set, all columns, in order. Raises UserError when it cannot be opened."""
    yield from _load(name, config=config, split=split, revision=revision, streaming=False)


def dataset_identity(name: str, *, config: str | None, split: str, revision: str | None) -> str:
    """What tells the contents of a data set from others, as the library sees them."""
    return str(_load(name, config=config, split=split, revision=revision, streaming=False)._fingerprint)


def saved_folder(name: str) -> bool:
    """Whether save_to_disk made this folder."""
    return any(Path(name, file).is_file() for file in SAVED_DATASET_FILES)


def _open(corpus: CorpusConfig, name: str) -> Any:
    try:
        return _load(
            name, config=corpus.hf_config, split=corpus.hf_split, revision=corpus.hf_revision, streaming=corpus.hf_streaming
        )
    except UserError as error:
        raise UserError(f"corpus.paths: {error}") from error.__cause__


def _load(name: str, *, config: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    """load_dataset, or load_from_disk for a folder that save_to_disk made."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if saved_folder(name):
            dataset = datasets.load_from_disk(name)
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset[split]
            return dataset.to_iterable_dataset() if streaming else dataset
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    # The library and the network below it raise errors of many families here; each of them means the same to the user.
    except Exception as error:  # noqa: BLE001
        words = " ".join(str(error).split())
        raise UserError(
            f"the data set {name} (config {config}, split {split}) cannot be opened: {type(error).__name__}: {words[:300]}"
        ) from error
