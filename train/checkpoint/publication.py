"""What happens to the folders of checkpoints on disk: begun, published, retained, set aside. Torch-free.

Order of a save: every rank's file, made durable; then the small files; then the manifest. Killed at any point, the folder
without a manifest is no checkpoint, and the next save of that step starts it afresh.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.checkpoint.manifest import (
    MANIFEST,
    Base,
    CheckpointError,
    Manifest,
    StoredFile,
    StoredFragment,
    StoredTensor,
    adapter_from_plain,
    file_facts,
    published,
    step_of,
    sync_folder,
    unpublished,
    write_durably,
)
from train.config.adapter import LoraConfig

QUARANTINE, BEST = "quarantined", "best"
_SPARE_BYTES = 8 * 1024**2  # for manifest, state, tokenizer, and what else writes to the file system meanwhile


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay."""

    last: int
    every_steps: int | None
    num_best: int = 0
    best: tuple[int, ...] = ()
    """Steps of the best evaluations, the best first; the first `num_best` of those that are published stay."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """All that is published beside the ranks' files; plain data, so that it can be sent to another process."""

    folder: str
    step: int
    tokens: int
    layout: dict[str, int]
    data_fingerprint: str
    config_yaml: str
    state_json: str
    tokenizer_folder: str
    health: dict[str, float]
    keep: Keep
    written_by: str = "pretrain"
    base: Base | None = None
    adapter: LoraConfig | None = None

    def to_json(self) -> str:
        """As one line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Publication:
        """The inverse of `to_json`."""
        raw = json.loads(text)
        nested = {
            "keep": Keep(**{**raw["keep"], "best": tuple(raw["keep"]["best"])}),
            "base": Base.from_plain(raw["base"]),
            "adapter": adapter_from_plain(raw["adapter"]),
        }
        return Publication(**{**raw, **nested})


def begin(folder: Path, total_bytes: int) -> None:
    """An empty folder to write into; what an interrupted save left there is removed.

    Raises CheckpointError when the file system has no room for `total_bytes`.
    """
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    needed = int(total_bytes * 1.01) + _SPARE_BYTES
    if free < needed:
        raise CheckpointError(
            f"{folder.parent}: a checkpoint needs {needed / 1024**2:,.0f} MiB, and there are {free / 1024**2:,.0f} MiB free; "
            f"make room, or lower checkpoint.keep_last"
        )
    folder.mkdir()


def discard(folder: Path) -> None:
    """Remove a folder that was not published: half a checkpoint would keep a full disk full."""
    if not (folder / MANIFEST).exists():
        shutil.rmtree(folder, ignore_errors=True)


def publish(publication: Publication, reports: Sequence[Mapping[str, Any]]) -> None:
    """Write the small files and then the manifest, which makes the folder a checkpoint; then remove old ones.

    `reports` are what the ranks' writers answered: file, bytes, sha256, and their index.
    """
    folder = Path(publication.folder)
    write_durably(folder / "state.json", publication.state_json.encode())
    write_durably(folder / "config.yaml", publication.config_yaml.encode())
    shutil.copytree(publication.tokenizer_folder, folder / "tokenizer")
    files = {report["file"]: StoredFile(bytes=report["bytes"], sha256=report["sha256"]) for report in reports}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"):
        files[path.relative_to(folder).as_posix()] = file_facts(path)
        _sync_file(path)
    sync_folder(folder / "tokenizer")
    manifest = Manifest(
        step=publication.step,
        tokens=publication.tokens,
        layout=publication.layout,
        data_fingerprint=publication.data_fingerprint,
        files=files,
        tensors=_tensors(reports),
        health=publication.health,
        written_by=publication.written_by,
        base=publication.base,
        adapter=publication.adapter,
        probe=next((report["file"] for report in reports if report["probe"]), None),
    )
    sync_folder(folder)
    write_durably(folder / MANIFEST, manifest.to_json().encode())
    sync_folder(folder)
    sync_folder(folder.parent)
    retain(folder.parent, publication.keep)
    link_best(folder.parent, publication.keep)


def retain(root: Path, keep: Keep) -> None:
    """Remove what is not kept; the manifest first, so that half a removal is no checkpoint."""
    folders = published(root)
    kept = {*folders[-keep.last :], *_best_of(folders, keep)}
    for folder in folders:
        if folder not in kept and (keep.every_steps is None or step_of(folder) % keep.every_steps):
            (folder / MANIFEST).unlink()
            shutil.rmtree(folder)
    # What a kill in the middle of a removal left, or a save of a cadence that was changed since.
    for folder in unpublished(root):
        if folders and step_of(folder) < step_of(folders[-1]):
            shutil.rmtree(folder)


def link_best(root: Path, keep: Keep) -> None:
    """Let `best` beside the folder of the checkpoints lead to the best that is kept; where there is none, it goes."""
    best = next(iter(_best_of(published(root), keep)), None)
    link, partial = root.parent / BEST, root.parent / f".{BEST}.partial"
    if best is None:
        link.unlink(missing_ok=True)
        return
    partial.unlink(missing_ok=True)
    partial.symlink_to(best.relative_to(root.parent))
    partial.replace(link)


def _best_of(folders: Sequence[Path], keep: Keep) -> list[Path]:
    """Those of `folders` that stay for being the best, the best first: one that was never written takes no place."""
    there = {step_of(folder): folder for folder in folders}
    return [there[step] for step in keep.best if step in there][: keep.num_best]


def set_aside(folder: Path, reason: str) -> Path:
    """Move a checkpoint that cannot be trusted to `quarantined/`, with the reason beside it; returns its new place."""
    root = folder.parent / QUARANTINE
    root.mkdir(exist_ok=True)
    number = 1
    while (target := root / f"{folder.name}.{number}").exists():
        number += 1
    folder.rename(target)
    write_durably(root / f"{target.name}.reason.txt", reason.encode() + b"\n")
    sync_folder(root)
    sync_folder(folder.parent)
    return target


def _tensors(reports: Sequence[Mapping[str, Any]]) -> dict[str, StoredTensor]:
    """The index of all ranks' fragments."""
    found: dict[str, tuple[tuple[int, ...], tuple[str, ...], list[StoredFragment]]] = {}
    for report in reports:
        for name, shape, kinds, place in report["index"]:
            _, _, pieces = found.setdefault(name, (tuple(shape), tuple(kinds), []))
            pieces.append(StoredFragment(file=report["file"], **place))
    return {
        name: StoredTensor(shape=shape, kinds=kinds, fragments=tuple(pieces)) for name, (shape, kinds, pieces) in found.items()
    }


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
