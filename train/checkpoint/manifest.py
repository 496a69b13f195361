"""What a checkpoint folder says of itself. A folder without a valid manifest is not a checkpoint.

Torch-free: a login node can list and check checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from conf.errors import UserError
from train.config.adapter import LoraConfig

FORMAT_VERSION = 2
BASED_VERSION = 3  # of a checkpoint that is a part of a model: a program that knows no base must not take it for one
READABLE_VERSIONS = (1, 2, 3)  # version 1 has no seal
MANIFEST = "manifest.json"
ADAM_KINDS = ("weight", "exp_avg", "exp_avg_sq")
FOLDER_NAME = re.compile(r"step-(\d{8,})")
BLANK_SEAL = "0" * 64  # stands in the place of the manifest's own SHA-256 while that is computed
_SEAL = re.compile(rb'"seal": "([0-9a-f]{64})"')


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or trusted."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not what was written: an older one may be taken in its place."""


@dataclass(frozen=True, kw_only=True)
class StoredFragment:
    """Where a piece lies: elements [start, start + length) of part `index` of `parts` along `dim`, flattened."""

    file: str
    start: int
    length: int
    dim: int = 0
    index: int = 0
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A logical tensor: its whole shape and its pieces; every piece holds the weight and what the optimizer keeps of it."""

    shape: tuple[int, ...]
    fragments: tuple[StoredFragment, ...]
    kinds: tuple[str, ...] = ADAM_KINDS


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Base:
    """The checkpoint that holds the tensors that a run did not train."""

    path: str
    """Its folder: from the run's folder where it lies in it, else absolute."""
    sha256: str
    """Of its manifest.json, which has the hashes of all its files."""
    tensors: tuple[str, ...]
    """Logical names of what is taken from it."""

    @staticmethod
    def from_plain(raw: dict | None) -> Base | None:
        """The inverse of `asdict`; None stays None."""
        return None if raw is None else Base(path=raw["path"], sha256=raw["sha256"], tensors=tuple(raw["tensors"]))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The index of a checkpoint."""

    step: int
    tokens: int
    layout: dict[str, int]
    data_fingerprint: str
    files: dict[str, StoredFile]
    tensors: dict[str, StoredTensor]
    health: dict[str, float] = field(default_factory=dict)
    """Loss and gradient norm of its last step, and `validation_loss` where the held-out text was read at that step."""
    written_by: str = "pretrain"
    """Verb that wrote it, which says what its config.yaml holds."""
    probe: str | None = None
    """File that holds the logits of the fixed batch; None: an older checkpoint, or a model without them."""
    base: Base | None = None
    """Where the tensors lie that its run did not train; None: it trained all."""
    adapter: LoraConfig | None = None
    """Settings of the adapters that are among the tensors; None: there are none."""

    def to_json(self) -> str:
        """Text of manifest.json, sealed with its own SHA-256."""
        version = FORMAT_VERSION if self.base is None else BASED_VERSION
        head = {"format": "longhaul-checkpoint", "version": version, "seal": BLANK_SEAL}
        text = json.dumps({**head, **asdict(self)}, indent=1)
        return text.replace(BLANK_SEAL, hashlib.sha256(text.encode()).hexdigest(), 1)


def folder_of(root: Path, step: int) -> Path:
    """Folder of the checkpoint of `step`."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Step of a checkpoint's folder, by its name."""
    return int(folder.name.removeprefix("step-"))


def published(root: Path) -> list[Path]:
    """Folders below `root` that have a manifest, oldest first."""
    return [path for path in _folders(root) if (path / MANIFEST).is_file()]


def unpublished(root: Path) -> list[Path]:
    """Folders below `root` of a save, or of a removal, that is going on or was cut off; oldest first."""
    return [path for path in _folders(root) if not (path / MANIFEST).is_file()]


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := FOLDER_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def resolve_checkpoint(text: str) -> Path:
    """The checkpoint folder that `text` means: itself, or the newest one of a run's folder.

    Raises UserError when there is none.
    """
    path = Path(text)
    if path.is_symlink():  # a run's best
        path = path.parent / path.readlink()
    if (path / MANIFEST).is_file():
        return path
    for root in (path / "checkpoints", path):
        if found := published(root):
            return found[-1]
    if not path.exists():
        raise UserError(f"checkpoint={text}: no such folder; give the folder of a run or of one of its checkpoints")
    raise UserError(f"checkpoint={text}: holds no checkpoint; give the folder of a run or of one of its checkpoints")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of `folder`.

    Raises CheckpointError when it is missing, of another version, or names a file outside the folder, and of that
    DamagedCheckpoint when it is not what was written.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        raw = json.loads(content.decode())
        if raw.pop("format", None) != "longhaul-checkpoint":
            raise DamagedCheckpoint(f"{path}: not the manifest of a Longhaul checkpoint")
        version = raw.pop("version", None)
        _check_seal(path, content, version)
        if version not in READABLE_VERSIONS:
            raise CheckpointError(f"{path}: written by another version of the format; this program reads up to {BASED_VERSION}")
        manifest = Manifest(
            step=raw["step"],
            tokens=raw["tokens"],
            layout=raw["layout"],
            data_fingerprint=raw["data_fingerprint"],
            files={name: StoredFile(**entry) for name, entry in raw["files"].items()},
            tensors={
                name: StoredTensor(
                    shape=tuple(entry["shape"]),
                    fragments=tuple(StoredFragment(**item) for item in entry["fragments"]),
                    kinds=tuple(entry.get("kinds", ADAM_KINDS)),
                )
                for name, entry in raw["tensors"].items()
            },
            health=raw.get("health", {}),
            written_by=raw.get("written_by", "pretrain"),
            probe=raw.get("probe"),
            base=Base.from_plain(raw.get("base")),
            adapter=adapter_from_plain(raw.get("adapter")),
        )
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error.strerror}); {folder} is not a checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{path}: damaged ({type(error).__name__}: {error}); remove {folder} to use an older one"
        ) from None
    named = [*manifest.files, *(piece.file for entry in manifest.tensors.values() for piece in entry.fragments)]
    named += [] if manifest.probe is None else [manifest.probe]
    for name in named:
        if name.startswith("/") or ".." in Path(name).parts:
            raise CheckpointError(f"{path}: names a file outside the checkpoint: {name}")
    if FOLDER_NAME.fullmatch(folder.name) and manifest.step != step_of(folder):
        raise DamagedCheckpoint(f"{path}: is of step {manifest.step}; remove {folder} to use an older one")
    return manifest


def adapter_from_plain(raw: dict | None) -> LoraConfig | None:
    """The inverse of `asdict`; None stays None."""
    return None if raw is None else LoraConfig(**{**raw, "targets": tuple(raw["targets"])})


def _check_seal(path: Path, content: bytes, version: object) -> None:
    """Compare the manifest with its own hash; a checkpoint of the first version has none."""
    found = _SEAL.search(content)
    if found is None:
        if version == 1:
            return
        raise DamagedCheckpoint(f"{path}: damaged (it has no seal); remove {path.parent} to use an older one")
    blanked = content[: found.start(1)] + BLANK_SEAL.encode() + content[found.end(1) :]
    if hashlib.sha256(blanked).hexdigest().encode() != found[1]:
        raise DamagedCheckpoint(
            f"{path}: its content is not what was written (SHA-256 differs); remove {path.parent} to use an older one"
        )


def file_facts(path: Path) -> StoredFile:
    """Size and hash of a file on disk."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return StoredFile(bytes=path.stat().st_size, sha256=digest.hexdigest())


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare size and hash of the named files with the manifest.

    Raises DamagedCheckpoint that names the first file that differs.
    """
    for name in names:
        path, expected = folder / name, manifest.files[name]
        way_out = f"remove {folder} to go on from the checkpoint before it"
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                raise DamagedCheckpoint(f"{path}: has {size} bytes, the manifest says {expected.bytes}; {way_out}")
            if file_facts(path).sha256 != expected.sha256:
                raise DamagedCheckpoint(f"{path}: its content is not what was written (SHA-256 differs); {way_out}")
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: cannot be read ({error.strerror}); {way_out}") from None


def sync_folder(path: Path) -> None:
    """Make the entries of a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file and make it durable; a reader sees the old content or the new, never half."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
