"""Saves and loads the checkpoints of one run; knows which of them can be trusted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from conf.compose import as_yaml
from train.checkpoint.image import FileImage
from train.checkpoint.manifest import (
    MANIFEST,
    Base,
    CheckpointError,
    DamagedCheckpoint,
    check_files,
    file_facts,
    folder_of,
    published,
    step_of,
)
from train.checkpoint.publication import Keep, Publication, link_best, retain, set_aside
from train.checkpoint.reader import CheckpointReader
from train.checkpoint.saving import SaveResult, SaveTask, Saving
from train.checkpoint.stored import PROBE
from train.checkpoint.writer import WriterProcess
from train.config.settings import RunSettings
from train.config.training import CheckpointConfig
from train.engine import Engine, Fragment
from train.model.adapters import MAGNITUDE, is_adapter
from train.model.init import draw
from train.model.lora import base_of, row_lengths
from train.parallel import ParallelContext

# How far the logits of the fixed batch may be off, as a fraction of the largest: another layout adds in another order.
PROBE_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp8": 0.1}

# Read of a checkpoint until its files are let go of: the pages of parts of tensors stay in this process's memory until then.
MAPPED_BYTES = 1 << 28

ValueT = TypeVar("ValueT")

_numbers = itertools.count()  # of the stores of this process; the same on all ranks, which make them together


@dataclass(frozen=True, kw_only=True)
class SetAside:
    """A checkpoint that could not be trusted, where it is now, and why."""

    step: int
    place: str
    reason: str


class CheckpointStore:
    """The checkpoints below one folder."""

    def __init__(
        self,
        root: Path,
        *,
        config: CheckpointConfig,
        context: ParallelContext,
        run_config: RunSettings,
        tokenizer_folder: Path,
        data_fingerprint: str,
        base: Path | None = None,
    ) -> None:
        """`base`: the checkpoint that holds what the run does not train; None: it trains all."""
        self.root = root
        self.config = config
        self.context = context
        self.run_config = run_config
        self.tokenizer_folder = tokenizer_folder
        self.data_fingerprint = data_fingerprint
        self.base = base
        self._base_sha256: str | None = None
        self.set_aside: list[SetAside] = []
        """What `load` has put into quarantine."""
        self._key, self._saves = f"checkpoints/{next(_numbers)}", itertools.count()
        self._image: FileImage | None = None
        self._writer: WriterProcess | None = None
        self._saving: Saving | None = None
        self._total_bytes = 0

    def save(
        self,
        engine: Engine,
        *,
        step: int,
        tokens: int,
        state: Mapping[str, Any],
        health: Mapping[str, float] | None = None,
        best: Sequence[int] = (),
    ) -> None:
        """Begin to save; all ranks together. Waits for the save before, if that is still going on. `best`: steps of the best
        evaluations, the best first, whose checkpoints are kept as far as the settings say.

        The values are those of now, whatever the training does meanwhile, provided that `before_update` is called before it
        changes them. How it went is what `poll` or `finish` returns; a save that fails publishes nothing.
        """
        self.finish()
        # What every tensor rank holds whole is written by the first of them.
        pieces = [piece for piece in engine.fragments() if piece.logical.parts > 1 or self.context.tensor.rank == 0]
        tensors = {
            f"{kind}/{piece.logical.name}": tensor.detach() for piece in pieces for kind, tensor in piece.tensors.items()
        }
        logits = engine.probe()
        if self.context.is_first:
            tensors[PROBE] = logits
        number = next(self._saves)
        task = SaveTask(
            publication=self._publication(engine, step, tokens=tokens, state=state, health=health or {}, best=best),
            file=f"rank-{self.context.rank:05d}.safetensors",
            index=_index(pieces),
            has_probe=self.context.is_first,
            total_bytes=self._make_ready({name: tuple(tensor.shape) for name, tensor in tensors.items()}),
            key=f"{self._key}/{number}",
            stale_key=f"{self._key}/{number - 2}" if number >= 2 else None,
        )
        self._saving = Saving(task, self._image, self._writer, self.context)
        self._saving.begin(tensors)

    def before_update(self) -> None:
        """To be called right before weights and moments change: waits until a save under way has copied them."""
        if self._saving is not None:
            self._saving.before_update()

    def poll(self) -> SaveResult | None:
        """The result of a save that has ended since the last look; never waits."""
        if self._saving is None or self._saving.result is None:
            return None
        return self.finish()

    @property
    def is_idle(self) -> bool:
        """Whether no save is under way."""
        return self._saving is None or self._saving.result is not None

    def finish(self) -> SaveResult | None:
        """Wait for the save under way and return its result; None when there is none."""
        if self._saving is None:
            return None
        self._saving.join()
        result, self._saving = self._saving.result, None
        assert result is not None, "the thread fills it in whatever happens"
        if not self.config.asynchronous:
            self.close()  # memory is held for those who want to be quick
        return result

    def close(self) -> None:
        """End the writing process and give its memory back."""
        assert self._saving is None, "finish first"
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._image is not None:
            self._image.close()
            self._image = None

    def load_newest(self, engine: Engine, *, before_step: int | None = None) -> CheckpointReader | None:
        """Load the newest checkpoint that can be trusted into `engine`, whatever layout wrote it; None when there is none.

        One that is damaged, or whose weights do not compute what they did, is set aside, and the one before it is taken.
        `before_step`: only those of earlier steps.
        Raises CheckpointError when it is of another model, or there are checkpoints and none can be used: a run never
        starts again from nothing by itself.
        """
        found = [path for path in published(self.root) if before_step is None or step_of(path) < before_step]
        doubtful: dict[Path, str] = {}
        for text in reversed(self.context.from_first([str(path) for path in found])):
            path = Path(text)
            try:
                reader = self._load(engine, path)
            except DamagedCheckpoint as error:
                doubtful[path] = str(error)
                continue
            self._set_aside(doubtful, best=reader.state.get("best", {}).get("steps", ()))
            return reader
        if doubtful:
            listed = "; ".join(f"{path.name}: {reason}" for path, reason in doubtful.items())
            raise CheckpointError(
                f"{self.root}: no checkpoint can be used, all are left as they are ({listed}); put one back from a copy, or "
                f"start another run with run.name=..."
            )
        return None

    def load_weights(
        self, engine: Engine, path: Path, *, new: Collection[str] = (), left_out: Collection[str] = ()
    ) -> CheckpointReader:
        """Load the weights, and nothing else, of a checkpoint that is not the run's own; all ranks together.

        Adapters get their initial values, and so do tensors that the checkpoint lacks, if their logical names are in `new`;
        those of `left_out` are passed over where it has them, also where the model has one of that name. If it has adapters,
        they come merged.
        Raises CheckpointError when other tensors differ, and of that DamagedCheckpoint, on every rank, when it is not what
        was written.
        """
        reader = self._open(path)
        there, here = {*reader.names} - {*left_out}, list(engine.logical_shapes)
        initial = {name for name in here if name not in there and (is_adapter(name) or name in new)}
        differ = [f"lacks {name}" for name in here if name not in there | initial]
        differ += [f"holds {name}, which the model has not" for name in reader.names if name not in {*here, *left_out}]
        if differ:
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise CheckpointError(f"{path}: {'; '.join(differ[:3])}{more}; it is a checkpoint of another model")
        self._together(lambda: self._begin(engine, reader, initial))
        engine.loaded(updates=0)
        return reader

    def keep_best(self, best: Sequence[int]) -> None:
        """Let the folders follow the best evaluations when these change without a save; all ranks together."""
        assert self._saving is None, "finish first"
        if self.context.is_first:
            retain(self.root, self._keep(best))
            link_best(self.root, self._keep(best))

    def quarantine_from(self, step: int, reason: str, *, best: Sequence[int]) -> None:
        """Set aside every checkpoint of `step` and later; all ranks together. `best`: as in `save`, of those before."""
        later = [str(path) for path in published(self.root) if step_of(path) >= step]
        self._set_aside({Path(text): reason for text in self.context.from_first(later)}, best=best)

    def _load(self, engine: Engine, path: Path) -> CheckpointReader:
        """Verify and load one. Raises DamagedCheckpoint, on every rank, when it is not what was written."""
        reader = self._open(path, base=self.base)
        self._together(lambda: self._fill(engine, reader))
        engine.loaded(reader.state["updates"])
        expected = reader.probe
        if expected is None:
            return reader
        off = (engine.probe().cpu() - expected).abs().max().item() / expected.abs().max().item()
        written_in = reader.config.precision
        allowed = max(PROBE_TOLERANCE[written_in], PROBE_TOLERANCE[self.run_config.precision])
        if not self.context.sum_over_ranks([int(not off <= allowed)])[0]:
            return reader
        raise DamagedCheckpoint(
            f"{path}: its files are what was written, but the logits of the fixed batch are off by {off:.1%} of the largest, "
            f"where {allowed:.1%} is allowed: the weights were copied while they changed, or the program computes otherwise"
        )

    def _open(self, path: Path, *, base: Path | None = None) -> CheckpointReader:
        """A checkpoint whose files are what was written, its base's too; every rank hashes its share."""
        reader = self._together(lambda: CheckpointReader(path, base=base))
        self._together(lambda: self._check(reader))
        return reader

    def _check(self, reader: CheckpointReader) -> None:
        names = sorted(reader.manifest.files)
        check_files(reader.path, reader.manifest, names[self.context.rank :: self.context.world_size])
        if reader.base is None:
            return
        try:
            self._check(reader.base)
        except DamagedCheckpoint as error:  # what was trained on it is whole: nothing of the run is to be set aside
            raise CheckpointError(f"{error}; {reader.path} was trained on it, put a whole copy in its place") from None

    def _fill(self, engine: Engine, reader: CheckpointReader) -> None:
        """Weights and moments of what trains, and the weights of the rest."""
        read_bytes = 0
        for fragment in (*engine.fragments(), *engine.frozen_fragments()):
            for kind, tensor in fragment.tensors.items():
                tensor.copy_(reader.read_apart(fragment.logical, kind, fragment.start, fragment.length))
                read_bytes += 4 * fragment.length
            if read_bytes > MAPPED_BYTES:
                reader.release()
                read_bytes = 0

    def _begin(self, engine: Engine, reader: CheckpointReader, initial: Collection[str]) -> None:
        """The weights that a run begins with: those of `initial` are drawn, but for the lengths of rows."""
        model, seed = self.run_config.model, self.run_config.run.seed
        for fragment in (*engine.fragments(), *engine.frozen_fragments()):
            logical, weight = fragment.logical, fragment.tensors["weight"]
            if logical.name not in initial:
                weight.copy_(reader.read_range(logical, "weight", fragment.start, fragment.length))
            elif logical.name.endswith(MAGNITUDE):
                lengths = logical.cut(row_lengths(reader.read(base_of(logical.name)))).reshape(-1)
                weight.copy_(lengths[fragment.start : fragment.start + fragment.length])
            else:
                draw(model, logical, seed, weight, start=fragment.start)

    def _base_of(self, engine: Engine) -> Base | None:
        """What the manifest says of the base; None where all trains."""
        if not (frozen := engine.frozen_names):
            return None
        assert self.base is not None, "what does not train must lie in another checkpoint"
        if self._base_sha256 is None:
            self._base_sha256 = file_facts(self.base / MANIFEST).sha256
        place, home = self.base.absolute(), self.root.parent.absolute()
        path = place.relative_to(home).as_posix() if place.is_relative_to(home) else str(place)
        return Base(path=path, sha256=self._base_sha256, tensors=frozen)

    def _set_aside(self, reasons: Mapping[Path, str], *, best: Sequence[int]) -> None:
        for folder, reason in reasons.items():
            place = self.context.from_first(str(set_aside(folder, reason)) if self.context.is_first else "")
            self.set_aside.append(SetAside(step=step_of(folder), place=place, reason=reason))
        if reasons and self.context.is_first:
            link_best(self.root, self._keep(best))

    def _keep(self, best: Sequence[int]) -> Keep:
        config = self.config
        return Keep(last=config.keep_last, every_steps=config.keep_every_steps, num_best=config.keep_best, best=tuple(best))

    def _make_ready(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Memory and writing process for a save; returns the bytes of all ranks' files."""
        if self._image is None:
            self._image = FileImage(shapes, pinned=self.context.device.type == "cuda")
            self._total_bytes = self.context.sum_over_ranks([self._image.size])[0]
        if self._writer is not None and not self._writer.alive:
            self._writer.close()
            self._writer = None
        if self._writer is None:
            self._writer = WriterProcess(self._image.fd, self._image.size)
        return self._total_bytes

    def _publication(
        self,
        engine: Engine,
        step: int,
        *,
        tokens: int,
        state: Mapping[str, Any],
        health: Mapping[str, float],
        best: Sequence[int],
    ) -> Publication:
        layout = {
            "world_size": self.context.world_size,
            "tensor": self.context.tensor.size,
            "zero": self.run_config.parallel.zero,
        }
        return Publication(
            folder=str(folder_of(self.root, step)),
            step=step,
            tokens=tokens,
            layout=layout,
            data_fingerprint=self.data_fingerprint,
            config_yaml=as_yaml(self.run_config),
            state_json=json.dumps(dict(state), indent=1),
            tokenizer_folder=str(self.tokenizer_folder),
            health=dict(health),
            keep=self._keep(best),
            written_by=self.run_config.stage,
            base=self._base_of(engine),
            adapter=engine.adapter,
        )

    def _together(self, action: Callable[[], ValueT]) -> ValueT:
        """Run `action` on every rank; if it fails on one, all raise the same error. Returns this rank's value."""
        problem, damaged = "", False
        try:
            value = action()
        except CheckpointError as error:
            problem, damaged = str(error), isinstance(error, DamagedCheckpoint)
        except OSError as error:
            problem, damaged = f"{error.filename or self.root}: {error.strerror or error}", True
        reports = self.context.gather_to_all((problem, damaged))
        problems = list(dict.fromkeys(problem for problem, _ in reports if problem))
        if problems:
            kind = DamagedCheckpoint if any(damaged for _, damaged in reports) else CheckpointError
            raise kind("; ".join(problems))
        return value


def _index(fragments: Sequence[Fragment]) -> list[Any]:
    """Name, logical shape, kinds and place of each piece of a file, as plain data."""
    return [
        (
            piece.logical.name,
            piece.logical.shape,
            tuple(piece.tensors),
            {
                "start": piece.start,
                "length": piece.length,
                "dim": piece.logical.dim if piece.logical.parts > 1 else 0,
                "index": piece.logical.index,
                "parts": piece.logical.parts,
            },
        )
        for piece in fragments
    ]
