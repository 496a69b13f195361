"""Where an evaluation is kept: a folder that appears when everything in it is written, and a run in Weights & Biases."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.compose import to_plain
from conf.errors import UserError
from data_pipeline.io import sync_folder
from train.checkpoint.manifest import write_durably
from train.config.evaluation import EvaluationConfig
from train.metrics import RunIdentity
from train.metrics.wandb_account import resolve_mode
from train.metrics.weights_and_biases import WandbWriter, new_wandb_id
from train.scores.record import (
    EVALUATION_FILE,
    EVALUATIONS_FOLDER,
    EXAMPLES_FILE,
    Evaluation,
    Example,
    write_examples,
)

SHOWN_FIGURES = 60


def folder_for(config: EvaluationConfig, home: Path, label: str) -> Path:
    """The folder to make: as given, or the first of its name that is not taken.

    Raises UserError for a given one that exists, and where no folder can be made: before the model has worked for hours.
    """
    first = home / EVALUATIONS_FOLDER / label if config.out is None else Path(config.out)
    number, out = 1, first
    while os.path.lexists(out):
        if config.out is not None:
            raise UserError(f"out={out}: exists; an evaluation never replaces another, give a folder that is not there")
        number += 1
        out = first.with_name(f"{first.name}-{number}")
    parent = next(folder for folder in out.absolute().parents if os.path.exists(folder))  # noqa: PTH110  (never raises)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be made, as {parent} does not let you write into it; give out=FOLDER elsewhere")
    return out


def publish(evaluation: Evaluation, examples: Sequence[Example], out: Path, *, more: Mapping[str, str] | None = None) -> Path:
    """Write the evaluation under `out`: the whole folder appears at once. `more`: further files by name, as text.

    Returns the folder; where another process was quicker under that name, it has a number behind it.
    Raises UserError when it cannot be written.
    """
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        write_examples(partial / EXAMPLES_FILE, examples)
        for name, text in (more or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        write_durably(partial / EVALUATION_FILE, evaluation.to_json().encode(errors="backslashreplace"))
        number, place = 1, out
        while True:
            try:
                partial.rename(place)  # fails where a folder with something in it is there
                break
            except OSError:
                if not place.exists():
                    raise
                number += 1
                place = out.with_name(f"{out.name}-{number}")
        sync_folder(place.parent)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror}); nothing was kept") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place


def facts_of_the_machine(device: Any, *, processes: int, tensor: int, seconds: float) -> dict[str, Any]:
    """What an evaluation ran on and how long."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(device),
        "processes": processes,
        "tensor": tensor,
        "seconds": round(seconds, 3),
        "created": time.time(),
    }


def send_to_wandb(config: EvaluationConfig, evaluation: Evaluation, folder: Path) -> str | None:
    """Send the scores as a run of their own, in the group of the run that made the model; returns the run's id.

    None where Weights & Biases is switched off. What the service does or does not do never fails an evaluation.
    """
    if resolve_mode(config.wandb, os.environ) == "disabled":
        return None
    run = str(evaluation.model.get("run") or Path(str(evaluation.model["path"])).name)
    identity = RunIdentity(
        name=f"{run} {folder.name}",
        run_id=f"{run}/{folder.name}",
        wandb_id=new_wandb_id(),
        attempt=1,
        job_type="evaluate",
        group=config.wandb.group or run,
        resolved_config=to_plain(config),
        layout={"processes": config.processes, "tensor": config.tensor},
    )
    writer = WandbWriter(config.wandb, folder, identity=identity, say=lambda text: print(text, file=sys.stderr))
    values = {name: score.value for name, score in evaluation.scores.items() if score.value is not None}
    bounds = {
        f"{name}_{side}": value
        for name, score in evaluation.scores.items()
        for side, value in (("low", score.low), ("high", score.high))
        if value is not None
    }
    place = {key: evaluation.model[key] for key in ("step", "tokens") if key in evaluation.model}
    writer.write(
        {
            "kind": "evaluation",
            "name": evaluation.name,
            "step": 0,
            "tokens": 0,
            **place,
            **values,
            **bounds,
            "time": evaluation.run["created"],
        }
    )
    writer.close("finished")
    return identity.wandb_id


def table(evaluation: Evaluation) -> list[str]:
    """The scores, for a person: one line a figure, the interval beside it, the reason where there is none."""
    rows = [("figure", "value", "interval")]
    for name, score in evaluation.scores.items():
        if score.value is None:
            rows.append((name, "-", score.undefined or "undefined"))
            continue
        interval = "" if score.low is None else f"[{_figure(score.low)}, {_figure(score.high)}]"
        rows.append((name, _figure(score.value), interval))
    hidden = len(rows) - 1 - SHOWN_FIGURES
    shown = rows[: SHOWN_FIGURES + 1]
    wide = [max(len(row[column]) for row in shown) for column in range(2)]
    lines = [f"{name:<{wide[0]}}  {value:>{wide[1]}}  {interval}".rstrip() for name, value, interval in shown]
    return lines + ([f"... and {hidden} more figures in {EVALUATION_FILE}"] if hidden > 0 else [])


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"
