"""What the model that a run begins with thinks of its rows: computed once before the first step, kept beside the rows.

The model itself is not needed again, so that a run of preferences has one model in memory, like any other.
Shape letters: R rows of a split, D documents of a micro-batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from conf.errors import UserError
from conf.frozen import hashed_fields
from data_pipeline.io import full_disk_is_users, read_json, sha256_of, sha256_of_texts, write_array, write_json
from data_pipeline.manifest import Split
from data_pipeline.pair_loader import PairLoader
from train.config.model import ModelConfig, RopeConfig
from train.engine import Engine
from train.held_out import shared_out
from train.parallel import ParallelContext

FOLDER = "reference"
FACTS_FILE = "reference.json"
FORMAT_VERSION = 1
# What the hash of a model was first made of, in order.
MODEL_FIELDS = (
    "family", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size", "ffn_size", "max_positions", "vocab_size",
    "vocab_multiple", "labels", "positions", "rope", "local_rope", "norm", "norm_epsilon", "norm_placement", "norm_one_plus",
    "residual", "mlp", "bias", "qkv_bias", "attention_output_bias", "qk_norm", "qk_norm_across_heads", "embedding_scale",
    "logit_softcap", "tied_head", "dropout", "window", "window_pattern", "attention_scale", "attention_softcap", "init_std",
    "mup_base_width", "z_loss",
)  # fmt: skip
ROPE_FIELDS = (
    "base", "fraction", "scaling", "factor", "low_frequency_factor", "high_frequency_factor", "original_max_positions",
    "fast_turns", "slow_turns", "truncate", "attention_factor", "short_factors", "long_factors",
)  # fmt: skip


def hash_of_model(model: ModelConfig) -> str:
    """Hash of a model's settings without its dropout, as text: what Python showed of them when there were these fields."""

    def text(name: str, settings: Any, first: Sequence[str]) -> str:
        values = hashed_fields(settings, first).items()
        return f"{name}({', '.join(f'{field}={of(value)}' for field, value in values)})"

    def of(value: Any) -> str:
        return text("RopeConfig", value, ROPE_FIELDS) if isinstance(value, RopeConfig) else repr(value)

    return sha256_of_texts([text("ModelConfig", replace(model, dropout=0.0), MODEL_FIELDS)])


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What the log-probabilities follow from."""

    rows: str
    """Fingerprint of the rows, whatever their order in training."""
    base: str
    """Hash of the manifest of the checkpoint that the run begins with."""
    model: str
    """Hash of the model's settings, some of which may be given beside the checkpoint; dropout, which is off, apart."""
    precision: str
    """The run's, in which they were computed."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The log-probabilities of one run's rows, and where they lie."""

    identity: Identity
    run_dir: Path
    elsewhere: str | None
    """Folder of another run, of which they are taken over; None: they are computed."""

    def give(
        self,
        loaders: Mapping[Split, PairLoader],
        compute: Callable[[], Mapping[Split, np.ndarray]],
        context: ParallelContext,
    ) -> None:
        """Hand the loaders what belongs to their rows, computed where no cache does; all ranks together.

        Raises UserError when `elsewhere` holds none of these rows and this beginning, or the run has begun with another.
        """
        sizes = {split: loader.num_rows for split, loader in loaders.items()}
        source = context.from_first(self._found(sizes) if context.is_first else None)
        if isinstance(source, UserError):
            raise source
        found = compute() if source is None else {split: _load(Path(source), split) for split in loaders}
        if context.is_first and source != str(self._own):
            _write(self._own, self.identity, found)
        for split, loader in loaders.items():
            loader.references_R = found[split]

    @property
    def _own(self) -> Path:
        return self.run_dir / FOLDER

    def _found(self, sizes: Mapping[Split, int]) -> str | UserError | None:
        """The folder that holds them already; None: there is none. What cannot be is an answer, for all ranks to raise."""
        has_begun = any((self.run_dir / "checkpoints").glob("step-*"))
        # A run that is resumed in another precision keeps what it has been compared with so far.
        as_before = replace(self.identity, precision=_facts(self._own).get("precision", "")) if has_begun else self.identity
        if _belongs(self._own, as_before, sizes):
            return str(self._own)
        facts = _facts(self._own)
        if facts.get("base", self.identity.base) != self.identity.base and has_begun:
            return UserError(
                f"initial_checkpoint: is not what {self.run_dir} has begun with, so its reference cannot be computed again; "
                "put that checkpoint back, or start another run with run.name=..."
            )
        if self.elsewhere is None:
            return None
        other = Path(self.elsewhere)
        other = other if (other / FACTS_FILE).is_file() else other / FOLDER
        if _belongs(other, self.identity, sizes):
            return str(other)
        return UserError(
            f"preference.reference={self.elsewhere}: {_difference(other, self.identity)}; give a run of the same rows, the "
            f"same beginning and precision={self.identity.precision}, or leave it out: the log-probabilities are then computed"
        )


def begun_with(run_dir: Path) -> str:
    """Hash of the manifest of the checkpoint that the run has begun with, as its reference tells.

    Raises UserError where it tells nothing.
    """
    base = _facts(run_dir / FOLDER).get("base")
    if base is None:
        raise UserError(
            f"initial_checkpoint: is gone, and {run_dir / FOLDER} does not hold what that model thinks of the rows; put the "
            "checkpoint back, or start another run with run.name=..."
        )
    return base


def compute_references(
    loaders: Mapping[Split, PairLoader],
    engine: Engine,
    context: ParallelContext,
    *,
    micro_batch: int,
    before_batch: Callable[[], None],
) -> dict[Split, np.ndarray]:
    """Log-probability of the targets of every row by the model of `engine`, fp32 [R] for each split; all ranks together.

    The ranks share the sequences among them; all batches are of `micro_batch` sequences.
    """
    groups = [
        (split, _filled_up(range(first, min(first + micro_batch, loader.samples_per_epoch)), micro_batch))
        for split, loader in loaders.items()
        for first in range(0, loader.samples_per_epoch, micro_batch)
    ]
    found = {split: np.zeros(loader.num_rows, dtype=np.float32) for split, loader in loaders.items()}
    mine = shared_out(groups, context)
    words, hide = "reference", None if context.is_first else True
    for (split, samples), counts in tqdm(list(mine), desc=words, unit="batch", disable=hide, file=sys.stderr, leave=False):
        before_batch()
        log_probability_D = engine.log_probabilities(loaders[split].micro_batch(samples)).numpy()
        if counts:
            rows_D = loaders[split].rows_in(samples)
            found[split][rows_D[rows_D >= 0]] = log_probability_D[: len(rows_D)][rows_D >= 0]
    # Each row was found by one rank alone, so the sum is what that rank found.
    sums = {split: context.sum_over_data(torch.from_numpy(found_R).to(context.device)) for split, found_R in found.items()}
    return {split: sum_R.cpu().numpy() for split, sum_R in sums.items()}


def _filled_up(samples: Sequence[int], size: int) -> list[int]:
    return [*samples, *[samples[-1]] * (size - len(samples))]


def _path(folder: Path, split: Split) -> Path:
    return folder / f"{split}.npy"


def _load(folder: Path, split: Split) -> np.ndarray:
    return np.load(_path(folder, split), allow_pickle=False)


def _facts(folder: Path) -> dict:
    path = folder / FACTS_FILE
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _belongs(folder: Path, identity: Identity, sizes: Mapping[Split, int]) -> bool:
    """Whether a folder holds the log-probabilities of these rows, undamaged."""
    facts = _facts(folder)
    wanted = {"format_version": FORMAT_VERSION, **asdict(identity)}
    if any(facts.get(name) != value for name, value in wanted.items()):
        return False
    hashes = facts.get("files", {})
    return all(
        _path(folder, split).is_file()
        and sha256_of(_path(folder, split)) == hashes.get(split)
        and _load(folder, split).shape == (size,)
        for split, size in sizes.items()
    )


def _difference(folder: Path, identity: Identity) -> str:
    facts = _facts(folder)
    if not facts:
        return f"{folder} holds no {FACTS_FILE}"
    differ = [name for name, value in asdict(identity).items() if facts.get(name) != value]
    return f"is of other {' and '.join(differ)}" if differ else "is damaged"


def _write(folder: Path, identity: Identity, found: Mapping[Split, np.ndarray]) -> None:
    """The file with the facts is written last: without it there is nothing."""
    with full_disk_is_users(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FACTS_FILE).unlink(missing_ok=True)
        for split, log_probability_R in found.items():
            write_array(_path(folder, split), log_probability_R)
        hashes = {split: sha256_of(_path(folder, split)) for split in found}
        write_json(folder / FACTS_FILE, {"format_version": FORMAT_VERSION, **asdict(identity), "files": hashes})
