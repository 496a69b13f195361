"""Writes, publishes, retains and loads the checkpoints of one run.

Order of a save: every rank's file, made durable; then the small files; then the manifest. Killed at any point, the folder
without a manifest is no checkpoint, and the next save of that step starts it afresh.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from conf.compose import write_config
from train.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    StoredFile,
    StoredFragment,
    StoredTensor,
    check_files,
    file_facts,
    folder_of,
    published,
    step_of,
    sync_folder,
    unpublished,
    write_durably,
)
from train.checkpoint.reader import CheckpointReader
from train.config.pretrain import PretrainConfig
from train.config.training import CheckpointConfig
from train.engine import Engine, Fragment
from train.parallel import ParallelContext


class CheckpointStore:
    """The checkpoints below one folder."""

    def __init__(
        self,
        root: Path,
        *,
        config: CheckpointConfig,
        context: ParallelContext,
        run_config: PretrainConfig,
        tokenizer_folder: Path,
        data_fingerprint: str,
    ) -> None:
        self.root = root
        self.config = config
        self.context = context
        self.run_config = run_config
        self.tokenizer_folder = tokenizer_folder
        self.data_fingerprint = data_fingerprint

    def save(self, engine: Engine, *, step: int, tokens: int, state: Mapping[str, Any]) -> Path:
        """Write and publish the checkpoint of `step`; all ranks together. Returns its folder.

        Raises CheckpointError on every rank when one of them could not write (a full disk, say); nothing is published.
        """
        folder = folder_of(self.root, step)
        try:
            self._together(lambda: self._begin(folder), only_first=True)
            # What every tensor rank holds whole is written by the first of them.
            fragments = [piece for piece in engine.fragments() if piece.logical.parts > 1 or self.context.tensor.rank == 0]
            file = f"rank-{self.context.rank:05d}.safetensors"
            reports = self._together(lambda: (file, _write_fragments(folder / file, fragments), _index(fragments, file)))
            self._together(lambda: self._publish(folder, reports, step, tokens, state), only_first=True)
        except CheckpointError:
            if self.context.is_first and not (folder / MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint would keep a full disk full
            raise
        return folder

    def load_newest(self, engine: Engine) -> CheckpointReader | None:
        """Load the newest checkpoint into `engine`, whatever layout wrote it; None when there is none.

        Raises CheckpointError when a file differs from what was written, or the checkpoint is of another model.
        """
        found = self.context.from_first([str(path) for path in published(self.root)[-1:]])
        if not found:
            return None
        reader = CheckpointReader(Path(found[0]))
        names = sorted(reader.manifest.files)
        self._together(lambda: check_files(reader.path, reader.manifest, names[self.context.rank :: self.context.world_size]))
        self._together(lambda: self._fill(engine, reader))
        engine.loaded(reader.state["updates"])
        return reader

    def _begin(self, folder: Path) -> None:
        """An empty folder to write into; what an interrupted save left there is removed."""
        if folder.exists():
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)
        folder.mkdir(parents=True)

    def _fill(self, engine: Engine, reader: CheckpointReader) -> None:
        fragments = engine.fragments()
        for fragment in fragments:
            for kind, tensor in fragment.tensors.items():
                tensor.copy_(reader.read_range(fragment.logical, kind, fragment.start, fragment.length))

    def _publish(self, folder: Path, reports: Sequence[Any], step: int, tokens: int, state: Mapping[str, Any]) -> None:
        files: dict[str, StoredFile] = {file: facts for file, facts, _ in reports}
        tensors: dict[str, StoredTensor] = {}
        for _, _, index in reports:
            for name, shape, kinds, piece in index:
                before = tensors[name].fragments if name in tensors else ()
                tensors[name] = StoredTensor(shape=shape, fragments=(*before, piece), kinds=kinds)
        write_durably(folder / "state.json", json.dumps(dict(state), indent=1).encode())
        write_config(self.run_config, folder / "config.yaml")
        shutil.copytree(self.tokenizer_folder, folder / "tokenizer")
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"):
            files[path.relative_to(folder).as_posix()] = file_facts(path)
        manifest = Manifest(
            step=step,
            tokens=tokens,
            layout={
                "world_size": self.context.world_size,
                "tensor": self.context.tensor.size,
                "zero": self.run_config.parallel.zero,
            },
            data_fingerprint=self.data_fingerprint,
            files=files,
            tensors=tensors,
        )
        sync_folder(folder)
        write_durably(folder / MANIFEST, manifest.to_json().encode())
        sync_folder(folder)
        sync_folder(self.root)
        self._retain()

    def _retain(self) -> None:
        """Remove what the settings do not keep; the manifest first, so that half a removal is no checkpoint."""
        folders = published(self.root)
        every = self.config.keep_every_steps
        for folder in folders[: -self.config.keep_last]:
            if every is not None and step_of(folder) % every == 0:
                continue
            (folder / MANIFEST).unlink()
            shutil.rmtree(folder)
        # What a kill in the middle of a removal left, or a save of a cadence that was changed since.
        for folder in unpublished(self.root):
            if step_of(folder) < step_of(folders[-1]):
                shutil.rmtree(folder)

    def _together(self, action: Any, *, only_first: bool = False) -> list[Any]:
        """Run `action` on every rank (or the first alone); if it fails on one, all raise the same error."""
        value, problem = None, ""
        if not only_first or self.context.is_first:
            try:
                value = action()
            except CheckpointError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{error.filename or self.root}: {error.strerror or error}{_space(self.root)}"
        reports = self.context.gather_to_all((value, problem))
        problems = list(dict.fromkeys(problem for _, problem in reports if problem))
        if problems:
            raise CheckpointError("; ".join(problems))
        return [value for value, _ in reports]


def _write_fragments(path: Path, fragments: Sequence[Fragment]) -> StoredFile:
    """Write this rank's pieces as one safetensors file, durably."""
    tensors = {
        f"{kind}/{fragment.logical.name}": tensor.detach().cpu().contiguous()
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
    }
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library hides a full disk in an error of its own
        raise OSError(None, str(error), str(path)) from None
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return file_facts(path)


def _index(fragments: Sequence[Fragment], file: str) -> list[tuple[str, tuple[int, ...], tuple[str, ...], StoredFragment]]:
    """Name, logical shape, kinds and place of each piece of a file."""
    return [
        (
            fragment.logical.name,
            fragment.logical.shape,
            tuple(fragment.tensors),
            StoredFragment(
                file=file,
                start=fragment.start,
                length=fragment.length,
                dim=fragment.logical.dim if fragment.logical.parts > 1 else 0,
                index=fragment.logical.index,
                parts=fragment.logical.parts,
            ),
        )
        for fragment in fragments
    ]


def _space(folder: Path) -> str:
    """How much room is left, for the message of a failed write."""
    while not folder.exists():
        folder = folder.parent
    return f" ({shutil.disk_usage(folder).free / 1024**2:,.0f} MiB free on {folder})"
