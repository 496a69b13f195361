"""What lies on disk, is hashed, compared or drawn from stays as it is: names, keys and seeds, compared with recorded ones.

A change of any of them makes runs, corpora or evaluations of older versions unreadable, or lets a resumed run go another way.
`tests/golden/frozen.json` was written by commit 417006b. What is new may be added to it; nothing that is in it is changed.
`python -m tests.unit.test_frozen` prints what the code has now.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conf.compose import read_config
from data_pipeline.encoded_rows import read_encoded
from data_pipeline.loader import Loader
from data_pipeline.pair_loader import PairLoader
from data_pipeline.row_loader import RowLoader
from data_pipeline.row_preparation import prepare_rows
from data_pipeline.sampler import Sampler
from data_pipeline.tokenizer import Tokenizer
from tests.distributed import uneven
from tests.golden import recorded
from train.config.adapter import LoraConfig
from train.config.model import ModelConfig
from train.config.runs import RUNS
from train.engine import Engine
from train.evaluate.publication import publish
from train.launch import prepare_folder, settle
from train.metrics.jsonl import FILE_NAME, JsonlWriter, read_metrics
from train.metrics.record import Output
from train.metrics.weights_and_biases import payload
from train.model.blueprint import Blueprint
from train.model.crossings import own_draws
from train.model.init import keyed_seed
from train.model.logical import logical_parameters
from train.model.transformer import Decoder, Reading, build_layers
from train.parallel import TensorRanks
from train.scores.record import EVALUATION_FILE, EXAMPLES_FILE, Evaluation, Example, Score

SEED = 11
FROZEN_FILE = recorded.FOLDER / "frozen.json"
ROWS = {"labelled": "classification-zero1-tensor2", "written": "lora-zero1-tensor2", "pairs": "preference-zero1-tensor1"}


def tensor_names(model: ModelConfig, lora: LoraConfig | None = None) -> dict[str, list[int]]:
    """Logical name -> logical shape of the parameters of built layers; blocks after the first are like it."""
    blueprint = Blueprint(model=replace(model, num_layers=1), lora=lora)
    decoder = Decoder(build_layers(blueprint, Reading(sequence_length=8, document_mask=False)))
    return {name: list(parameter.logical.shape) for name, parameter in logical_parameters(decoder).items()}


def all_tensor_names() -> dict[str, Any]:
    dora = LoraConfig(rank=2, dora=True)
    return {
        "gpt2": tensor_names(uneven.TINY_GPT2),
        "llama": tensor_names(replace(uneven.TINY, tied_head=False)),
        "qwen3 with labels": tensor_names(uneven.TINY_LABELS),
        "gemma3": tensor_names(uneven.TINY_GEMMA),
        "olmo2": tensor_names(uneven.TINY_OLMO2),
        "neox": tensor_names(uneven.TINY_PARALLEL),
        "llama with dora": tensor_names(uneven.TINY, dora),
    }


def dropout_seeds() -> dict[str, int]:
    """The seed of torch's generator at some places of a run, as "step, micro-batch, data rank, tensor rank, rows are split"."""
    found = {}
    places = ((1, 0, 0, 0, 0), (1, 1, 0, 0, 0), (2, 0, 0, 0, 0), (2, 0, 3, 0, 0), (2, 0, 0, 1, 0), (2, 0, 0, 1, 1))
    for step, micro_batch, data_rank, rank, split in places:
        tensor = TensorRanks(rank=rank, size=2, sequence_parallel=bool(split))
        place = SimpleNamespace(dropout_seed=SEED, context=SimpleNamespace(data_rank=data_rank, tensor=tensor))
        with torch.random.fork_rng():
            Engine._seed_dropout(place, step, micro_batch)  # type: ignore[arg-type]
            found[f"{step}, {micro_batch}, {data_rank}, {rank}, {split}"] = torch.initial_seed()
            with own_draws(tensor, "blocks.0.attention", dropout=0.1):
                found[f"{step}, {micro_batch}, {data_rank}, {rank}, {split}, attention"] = torch.initial_seed()
    found["initial values of blocks.0.mlp.down.weight"] = keyed_seed(SEED, "blocks.0.mlp.down.weight")
    return found


def sample_order() -> dict[str, Any]:
    """Sources, windows and epochs of the first samples and of later ones; the second source is read many times."""
    sampler = Sampler([1000, 7], weights=[3.0, 1.0], names=["english", "other"], seed=SEED)
    places = {"first": np.arange(24), "later": np.arange(10**9, 10**9 + 24)}
    return {name: [part.tolist() for part in sampler.locate(ids)] for name, ids in places.items()}


def fingerprints() -> dict[str, str]:
    """Of the data of every recorded run, as its next start finds it: the name is that of the run."""
    return {name: _settled(name).fingerprint for name in recorded.NAMES}


def rows_encoded_anew() -> dict[str, Any]:
    """Fingerprint of the rows when they are read from their files again, and hash of all their samples, in file order."""
    found = {}
    for rows, name in ROWS.items():
        config = _settled(name).config
        kept = read_encoded(Path("runs") / name / "rows", verify="full")
        with tempfile.TemporaryDirectory() as folder:
            encoded = prepare_rows(
                config.task, config.data, tokenizer=Tokenizer(Path("runs") / name / "tokenizer"), opening=kept.opening,
                end_of_document=kept.end_of_document, vocab_size=config.model.vocab_size, seed=config.run.seed,
                folders=[Path(folder) / "rows"],
            )  # fmt: skip
            loader = RowLoader(
                encoded, split="validation", sequence_length=config.sequence_length, seed=SEED,
                vocab_size=config.model.vocab_size,
            )  # fmt: skip
            found[rows] = [encoded.fingerprint, loader.micro_batch(range(loader.num_samples)).data_hash]
    return found


def data_read() -> dict[str, int]:
    """Hash of the samples that each recorded run reads in its first 12 steps."""
    found = {}
    for name in recorded.NAMES:
        config = _settled(name).config
        common = {"split": "train", "seed": config.run.seed, "vocab_size": config.model.vocab_size}
        if config.stage == "pretrain":
            loader = Loader(config.data, **common)
        else:
            rows = read_encoded(Path("runs") / name / "rows", verify="sizes")
            make = PairLoader if config.pairs is not None else RowLoader
            loader = make(rows, sequence_length=config.sequence_length, **common)
            if config.pairs is not None:
                loader.references_R = np.zeros(loader.num_rows, dtype=np.float32)
        found[name] = loader.micro_batch(range(96)).data_hash
    return found


def run_file() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        prepare_folder(Path(folder), _settled(recorded.NAMES[0]).config)
        return sorted(json.loads((Path(folder) / "run.json").read_text(encoding="utf-8")))


def wandb_keys() -> dict[str, list[str]]:
    """What Weights & Biases gets of the recorded metrics of each kind of run. `test_golden_runs` holds their own keys."""
    found: dict[str, set[str]] = {}
    for name in recorded.NAMES:
        for record in read_metrics(Path("runs") / name / FILE_NAME):
            found.setdefault(f"{name.partition('-')[0]}, {record['kind']}", set()).update(payload(record))
    return {name: sorted(keys) for name, keys in found.items()}


def evaluation_files() -> dict[str, Any]:
    """Keys in the files of an evaluation, and of what a run answers on its way."""
    fields_of_example = {"input": "a", "truths": ("b",), "output": "c", "probabilities": {"b": 1.0}, "scores": {"loss": 0.5}}
    counts = {"loss": 1.5, "input_tokens": 1, "target_tokens": 1, "target_bytes": 1, "output_tokens": 1}
    example = Example(id="dev.tsv:1", source="dev.tsv", **fields_of_example, **counts)
    evaluation = Evaluation(
        name="sst2", kind="classification", model={}, data=[], config={}, scores={"loss": Score(value=1.5, low=1.0, high=2.0)}
    )
    answer = Output(id="dev.tsv:1", input="a", truth="b", output="c", scores={"loss": 0.5})
    with tempfile.TemporaryDirectory() as place:
        folder = publish(evaluation, [example], Path(place) / "evaluation")
        content = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))
        line = json.loads((folder / EXAMPLES_FILE).read_text(encoding="utf-8"))
        writer = JsonlWriter(Path(place) / FILE_NAME, say=print)
        writer.outputs(7, [answer])
        writer.close("finished")
        outputs = {path.relative_to(place).as_posix(): json.loads(path.read_text()) for path in Path(place).glob("outputs/*")}
        return {
            "files": sorted(path.name for path in folder.iterdir()),
            "evaluation": sorted(content),
            "score": sorted(content["scores"]["loss"]),
            "example": sorted(line),
            "outputs": {name: sorted(output) for name, output in outputs.items()},
        }


def _settled(name: str) -> Any:
    return settle(read_config(RUNS, Path("runs") / name / "config.yaml"))


# Of the former any change is one too many; what the latter hold may grow.
EXACT: dict[str, Callable[[], Any]] = {
    "tensor names": all_tensor_names,
    "dropout seeds": dropout_seeds,
    "sample order": sample_order,
    "fingerprints": fingerprints,
    "rows encoded anew": rows_encoded_anew,
    "data read": data_read,
}
AT_LEAST: dict[str, Callable[[], Any]] = {
    "run.json": run_file,
    "W&B": wandb_keys,
    "evaluation files": evaluation_files,
}


@pytest.fixture(autouse=True)
def among_the_recorded_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths in their settings are relative; nothing is written there."""
    monkeypatch.chdir(recorded.FOLDER)


@pytest.mark.parametrize("name", EXACT)
def test_is_as_it_was(name: str) -> None:
    assert EXACT[name]() == json.loads(FROZEN_FILE.read_text(encoding="utf-8"))[name]


@pytest.mark.parametrize("name", AT_LEAST)
def test_holds_what_it_held(name: str) -> None:
    missing = _missing(json.loads(FROZEN_FILE.read_text(encoding="utf-8"))[name], AT_LEAST[name]())
    assert not missing, missing


def _missing(before: Any, now: Any) -> Any:
    """What of nested dictionaries of lists is gone."""
    if isinstance(before, dict):
        return {key: gone for key, value in before.items() if (gone := _missing(value, now.get(key, [])))}
    return sorted(set(before) - set(now))


if __name__ == "__main__":
    os.chdir(recorded.FOLDER)
    print(json.dumps({name: make() for name, make in (EXACT | AT_LEAST).items()}, indent=1))
