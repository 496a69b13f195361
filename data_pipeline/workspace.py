"""The folder a preparation works in, and every reason not to begin: other settings, changed input, another at work, no room."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.config import PrepareConfig, TokenizerConfig
from data_pipeline.inputs import Inputs
from data_pipeline.io import COMPRESSED_SUFFIXES, existing_parent, free_bytes, read_json, readable_bytes, write_json
from data_pipeline.manifest import MANIFEST_FILE, Manifest, read_manifest
from data_pipeline.steps import Workspace
from data_pipeline.tokenizer import Tokenizer, adopt_tokenizer

SETTINGS_FILE = "settings.json"
# Settings that do not change what is written. The engine is one: its ids are proven equal.
FREE_SETTINGS = ("output", "workers", "dry_run", "tokenizer.engine", "phase", "part", "parts")
# Text on disk for a byte of compressed input, a usual ratio for source code and prose.
COMPRESSION_RATIO = 4.0
# Bytes in the workspace for a byte of text: compressed documents a third, then tokens twice (parts, shards), half a byte each.
WORK_BYTES_PER_TEXT_BYTE = 1.4
# What no tokenizer can avoid: about one token of two bytes in every eight bytes of text.
LEAST_BYTES_PER_TEXT_BYTE = 0.25


def partial_folder(output: Path) -> Path:
    """Where the work is done: beside the output, on the same disk."""
    return output.with_name(output.name + ".partial")


def settings_of(config: PrepareConfig) -> dict[str, Any]:
    """The settings as they are kept in the manifest: plain lists, numbers and texts."""
    whole = dataclasses.replace(config, phase="all", part=0, parts=1)  # how the work was shared leaves no trace
    return json.loads(json.dumps(dataclasses.asdict(whole)))


def finished_corpus(config: PrepareConfig) -> Manifest | None:
    """The corpus at `output` if it is finished and made with these settings.

    Raises UserError when it was made with others, or something else lies there.
    """
    output = config.output_folder
    if not output.exists():
        return None
    if not output.is_dir():
        raise UserError(f"output={output}: is a file; give a folder that does not exist yet")
    if not (output / MANIFEST_FILE).exists():
        if not any(output.iterdir()):
            return None
        raise UserError(f"output={output}: holds other files and no {MANIFEST_FILE}; give a new folder, or empty this one")
    manifest = read_manifest(output)
    difference = _difference(manifest.config, settings_of(config))
    if difference:
        raise UserError(
            f"output={output}: already holds a corpus made with other settings: {difference}. Give another output=FOLDER, or "
            f"remove {output} to make it anew"
        )
    return manifest


def open_workspace(config: PrepareConfig, inputs: Inputs) -> Workspace:
    """Make the workspace, or take up the one that an interrupted preparation left, or that others work on as well.

    Raises UserError when that one had other settings or other input.
    """
    workspace = Workspace(partial_folder(config.output_folder))
    marker = workspace.folder / SETTINGS_FILE
    if marker.exists():
        kept = read_json(marker)
        difference = _difference(kept["settings"], settings_of(config))
        if not difference and kept["inputs"] != inputs.fingerprint:
            difference = "files were added, removed or changed since it began"
        if difference:
            raise UserError(
                f"{workspace.folder}: holds an unfinished preparation that does not fit this one: {difference}. Remove the "
                "folder to begin anew, or give another output=FOLDER"
            )
        if config.parts == 1:
            print(f"{workspace.folder}: taking up an unfinished preparation")
    for folder in (workspace.folder / "documents", workspace.folder / "tokens", workspace.corpus):
        folder.mkdir(parents=True, exist_ok=True)
        if config.parts == 1:  # otherwise they may be of another part, which is writing them
            for left in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                left.unlink()
    if not marker.exists():
        write_json(marker, {"settings": settings_of(config), "inputs": inputs.fingerprint})
    return workspace


@contextmanager
def locked(output: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep a second preparation of the same output out; `shared`: but for other parts of this one.

    Raises UserError when one is at work.
    """
    partial = partial_folder(output)
    partial.parent.mkdir(parents=True, exist_ok=True)
    path = partial.with_name(partial.name + ".lock")
    with path.open("a+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"output={output}: another preparation is at work on it ({file.read().strip() or 'unknown'}); wait for it, or "
                "give another output=FOLDER"
            ) from None
        except OSError as error:  # some network disks cannot lock
            print(f"note: {path} cannot be locked ({error.strerror}); make sure that no other preparation writes to {output}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        try:
            yield
        finally:
            if not shared:
                path.unlink(missing_ok=True)


def estimated_text_bytes(inputs: Inputs) -> float:
    """Bytes of text in the input, compressed files at a usual ratio; 0 where it cannot be told (hf)."""
    files = (file for unit in inputs.units for file in unit.files)
    return sum(file.size * (COMPRESSION_RATIO if file.path.endswith(COMPRESSED_SUFFIXES) else 1.0) for file in files)


def estimated_bytes(inputs: Inputs) -> int | None:
    """Bytes of disk that the preparation takes at its peak; None where the input's size is not known."""
    return int(estimated_text_bytes(inputs) * WORK_BYTES_PER_TEXT_BYTE) or None


def check_room(output: Path, inputs: Inputs) -> None:
    """Raises UserError when the output's disk cannot be written to or has certainly too little room."""
    parent = existing_parent(output.parent)
    if not os.access(parent, os.W_OK):
        raise UserError(f"output={output}: {parent} cannot be written to; give another output=FOLDER")
    partial = partial_folder(output)
    used = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else 0
    least = sum(file.size for unit in inputs.units for file in unit.files) * LEAST_BYTES_PER_TEXT_BYTE
    free = free_bytes(output) + used
    if free < least:
        raise UserError(
            f"output={output}: {readable_bytes(free)} are free in {parent}, at least {readable_bytes(least)} are needed "
            f"(about {readable_bytes(estimated_bytes(inputs) or least)} at the peak); make room or give another output=FOLDER"
        )


def check_tokenizer_request(config: TokenizerConfig) -> None:
    """Find out before hours of reading whether the tokenizer can be had at all. Raises UserError when not."""
    if config.engine == "gigatoken" and importlib.util.find_spec("gigatoken") is None:
        raise UserError(
            "tokenizer.engine=gigatoken: it is not installed; pip install gigatoken, or use tokenizer.engine=hf or auto"
        )
    if config.path is None:
        return
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        adopt_tokenizer(config.path, Path(folder))
        tokenizer = Tokenizer(folder)
        tokenizer.end_of_document(config.end_of_document)
        tokenizer.token_bytes()


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that differ, by their dotted names; empty when none does."""
    old, new = _flat(before), _flat(now)
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name) and name not in FREE_SETTINGS]
    return ", ".join(f"{name}={old.get(name)} then, {new.get(name)} now" for name in names)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
