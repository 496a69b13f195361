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


def _open(corpus: CorpusConfig, name: str) -> Any:
    """load_dataset, or load_from_disk for a folder that save_to_disk made."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if any(Path(name, file).is_file() for file in SAVED_DATASET_FILES):
            dataset = datasets.load_from_disk(name)
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset[corpus.hf_split]
            return dataset.to_iterable_dataset() if corpus.hf_streaming else dataset
        return datasets.load_dataset(
            name, corpus.hf_config, split=corpus.hf_split, revision=corpus.hf_revision, streaming=corpus.hf_streaming
        )
    # The library and the network below it raise errors of many families here; each of them means the same to the user.
    except Exception as error:  # noqa: BLE001
        words = " ".join(str(error).split())
        raise UserError(
            f"corpus.paths: the data set {name} (config {corpus.hf_config}, split {corpus.hf_split}) cannot be opened: "
            f"{type(error).__name__}: {words[:300]}"
        ) from error
