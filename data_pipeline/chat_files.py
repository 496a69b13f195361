"""What lies beside a tokenizer so that a model that has learned to answer is understood anywhere: its chat template, and the
ids at which an answer is complete. tokenizer.json itself stays as it is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from conf.errors import UserError
from data_pipeline.chat import special_tokens
from data_pipeline.io import read_json, write_json
from data_pipeline.tokenizer import GENERATION_FILE, Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"


def copy_for_answers(source: Path, folder: Path, *, template: str | None, endings: Sequence[int]) -> None:
    """A copy of the tokenizer in `source`, whole or not at all, with the template and the ids that a model was trained with.

    `template`: of its dialogues; None: it was trained with none, and what the source has stays. `endings`: ids that end its
    answers. Raises UserError when the folder cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        if template is not None:
            _put_template(partial, template)
        _put_endings(partial, endings)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids at which what a model writes is complete, as transformers' `generate` takes them: those of generation_config.json,
    and the tokenizer's own end token."""
    path = tokenizer.folder / GENERATION_FILE
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    listed = [] if found is None else found if isinstance(found, list) else [found]
    own = _id_of(tokenizer, "eos_token")
    return tuple(dict.fromkeys([*listed, *([] if own is None else [own])]))


def _put_template(folder: Path, template: str) -> None:
    """One template in all places where readers look: newer ones in a file of its own, older ones in the settings."""
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / SETTINGS_FILE
    settings = read_json(path) if path.is_file() else {}
    if settings.get("chat_template") not in (None, template):
        write_json(path, settings | {"chat_template": template})


def _put_endings(folder: Path, endings: Sequence[int]) -> None:
    """The ids that end answers, where they are not told yet; the rest of a file that is there stays."""
    tokenizer = Tokenizer(folder)
    known = end_ids(tokenizer)
    if set(endings) <= set(known):
        return
    path = folder / GENERATION_FILE
    kept = read_json(path) if path.is_file() else {}
    roles = {f"{role}_id": _id_of(tokenizer, role) for role in ("bos_token", "pad_token")}
    listed = {"eos_token_id": list(dict.fromkeys([*endings, *known]))}
    write_json(path, {name: number for name, number in roles.items() if number is not None} | kept | listed)


def _id_of(tokenizer: Tokenizer, role: str) -> int | None:
    token = special_tokens(tokenizer).get(role)
    return None if token is None else tokenizer.backend.token_to_id(token)
