"""`longhaul report`: a run as one page: its curves, its attempts, where its time went, what it was made of, what it writes.

With wandb=true the records go to Weights & Biases instead, under the run's own id.
"""

from __future__ import annotations

import io
import json
import time
from collections import deque
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.compose import read_config, to_plain
from conf.errors import ConfigError, UserError
from tools.curves import draw
from tools.history import History
from tools.page import bar, charts, folded, hidden, note, page, section, table, tiles
from tools.run_charts import make_charts
from tools.run_rows import outputs_table, rows_table
from train.checkpoint.manifest import write_durably
from train.config.finetune import FinetuneConfig
from train.config.pretrain import PretrainConfig
from train.config.runs import RUNS
from train.config.settings import RunSettings
from train.metrics.console import duration
from train.metrics.goodput import CATEGORIES
from train.metrics.jsonl import FILE_NAME
from train.outcome import last_attempt, read_outcome
from train.state import INTERVENTIONS_FILE, read_interventions

MOST_PARAMETERS = 200_000_000  # of a model that is sampled without being asked for
PROMPT_TOKENS = 24
SAMPLES_FILE = "samples.jsonl"
SAMPLES_SHOWN = 20
ATTEMPTS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    run: str = ""
    """Folder of a run, such as runs/first."""
    out: str | None = None
    """Folder for the page and its pictures; null: report/ in the run's folder."""
    samples: int | None = None
    """Of a pretraining run: continuations by the newest checkpoint; null: 2 of a small model, none of a large one."""
    prompt: str | None = None
    """What they continue; null: the beginning of the held-out text."""
    wandb: bool = False
    """Send the records to Weights & Biases, under the run's own id, and write no page."""

    def __post_init__(self) -> None:
        if not self.run:
            raise ConfigError(["run: needs the folder of a run; give run=runs/NAME"])
        if self.samples is not None and self.samples < 0:
            raise ConfigError([f"samples={self.samples}: must not be negative; 0 makes none"])


def run(config: ReportConfig) -> int:
    """Write the page, or send the records; returns 0.

    Raises UserError for a folder that is no run's, and what sending can meet.
    """
    run_dir = Path(config.run)
    settings = read_config(RUNS, run_dir / "config.yaml")
    if config.wandb:
        return _send(run_dir, settings)
    out = Path(config.out) if config.out is not None else run_dir / "report"
    history = History.read(run_dir / FILE_NAME) if (run_dir / FILE_NAME).exists() else History()
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn = [draw(chart, out) for chart in make_charts(history)]
        text = page(f"Run {settings.run.name}", _lead(run_dir), _sections(config, settings, history, drawn))
        (out / "index.html").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror})") from None
    print(f"report           {out / 'index.html'}, {len(drawn)} pictures beside it")
    return 0


def _send(run_dir: Path, settings: RunSettings) -> int:
    from train.metrics import RunIdentity
    from train.metrics.weights_and_biases import replay

    record = _run_record(run_dir)
    identity = RunIdentity(
        name=settings.run.name,
        run_id=record["run_id"],
        wandb_id=record["wandb_id"],
        attempt=last_attempt(run_dir),
        job_type=record.get("verb", "pretrain"),
        group=settings.monitor.wandb.group or settings.run.name,
        resolved_config=to_plain(settings),
        layout={"processes": record.get("processes"), "zero": settings.parallel.zero, "tensor": settings.parallel.tensor},
        notes=settings.run.notes,
    )
    # The run itself may have been told to stay offline; this is asked for.
    monitor = replace(settings.monitor, wandb=replace(settings.monitor.wandb, mode="online"))
    place, number = replay(run_dir, monitor, identity=identity, save_wandb_id=lambda new: _keep_wandb_id(run_dir, new))
    print(f"sent             {number:,} records to {place}" if number else f"nothing to send  {place} has every record")
    return 0


def _keep_wandb_id(run_dir: Path, wandb_id: str) -> None:
    write_durably(run_dir / "run.json", json.dumps(_run_record(run_dir) | {"wandb_id": wandb_id}, indent=2).encode())


def _run_record(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is {run_dir} the folder of a run?") from None
    if not isinstance(record, dict) or not {"run_id", "wandb_id"} <= record.keys():
        raise UserError(f"{path}: damaged, it does not hold the ids of the run; put back what the run wrote")
    return record


def _lead(run_dir: Path) -> str:
    record = _run_record(run_dir)
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    created = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.get("created", 0)))
    return f"{record.get('run_id', '')}, begun {created}, commit {(record.get('git_commit') or 'unknown')[:12]}, {versions}"


def _sections(config: ReportConfig, settings: RunSettings, history: History, drawn: list[str]) -> list[str]:
    run_dir = Path(config.run)
    return [
        tiles(_facts(run_dir, history)),
        section("Curves", charts(drawn) if drawn else note("No step has been recorded yet.")),
        section("Where the time went", *_time(history)),
        section("Attempts", *_attempts(run_dir, history)),
        section("Rollbacks", *_rollbacks(run_dir)),
        *_read_and_written(run_dir, config, settings),
        section("Configuration", folded("config.yaml", (run_dir / "config.yaml").read_text(encoding="utf-8"))),
    ]


def _facts(run_dir: Path, history: History) -> dict[str, str]:
    last, best = history.last, history.best_held_out
    outcome = read_outcome(run_dir, last_attempt(run_dir)) if last_attempt(run_dir) else None
    place = "" if best is None else f", step {best[1]:,}" + (f", {best[2]}" if best[2] else "")
    return {
        "state": outcome.state if outcome else "running, or cut off",
        "step": f"{last['step']:,}" if last else "-",
        "tokens": f"{last['tokens']:,}" if "tokens" in last else "-",
        "training loss": f"{float(last['loss']):.4f}" if "loss" in last else "-",
        f"best held-out loss{place}": "-" if best is None else f"{best[0]:.4f}",
        "tokens/s": f"{float(last['tokens_per_second']):,.0f}" if "tokens_per_second" in last else "-",
        "goodput": f"{100 * float(history.totals['goodput']):.1f} %" if "goodput" in history.totals else "-",
        "attempts": str(last_attempt(run_dir)),
        "rollbacks": str(len(history.rollbacks)),
        "skipped steps": f"{len(history.steps_with('skipped')):,}",
        "spikes": f"{len(history.steps_with('spike')):,}",
        "steps done again": f"{history.steps_again:,}",
    }


def _time(history: History) -> list[str]:
    seconds = {name: float(history.totals.get(f"seconds_{name}", 0.0)) for name in CATEGORIES}
    total = sum(seconds.values())
    if not total:
        return [note("Nothing was recorded of it.")]
    colours = dict(zip(CATEGORIES, ("#3f9e6e", "#c0504d", "#d97706", "#3b82c4", "#7c6bc4", "#9098a0"), strict=True))
    meaning = {
        "productive": "steps that count",
        "lost": "steps that had to be done again",
        "restart": "from an attempt's start to its first step",
        "checkpoint": "the loop held up by a checkpoint",
        "evaluation": "reading the held-out text",
        "idle": "no attempt was running",
    }
    rows = [
        [name, f"{value:,.1f}", duration(value), f"{100 * value / total:.2f} %", meaning[name]]
        for name, value in seconds.items()
    ]
    rows.append(["all", f"{total:,.1f}", duration(total), "100.00 %", "from the first attempt's start to the last step"])
    return [
        bar({name: value / total for name, value in seconds.items()}, colours),
        table(["time", "seconds", "", "share", "what it is"], rows, colours=colours),
    ]


def _attempts(run_dir: Path, history: History) -> list[str]:
    """The newest attempts, and the older ones behind a click."""
    last = last_attempt(run_dir)
    if not last:
        return [note("None.")]
    head = ["attempt", "began", "ended", "state", "reason", "step", "host"]
    rows = [_attempt_row(run_dir, history, number, is_last=number == last) for number in range(last, 0, -1)]
    newest, older = rows[:ATTEMPTS_SHOWN], rows[ATTEMPTS_SHOWN:]
    more = [hidden(f"{len(older):,} older attempts", table(head, older))] if older else []
    return [table(head, newest), *more]


def _attempt_row(run_dir: Path, history: History, number: int, *, is_last: bool) -> list[str]:
    begun = _clock(history.begun[number]) if number in history.begun else "no step done"
    try:
        outcome = read_outcome(run_dir, number)
    except UserError as error:
        return [str(number), begun, "-", "unknown", str(error), "-", "-"]
    if outcome is None:
        reason = "it is running, or was cut off" if is_last else "it was cut off"
        return [str(number), begun, "-", "no outcome", reason, "-", "-"]
    step = "-" if outcome.step is None else f"{outcome.step:,}"
    return [str(number), begun, _clock(outcome.time), outcome.state, outcome.reason, step, outcome.host]


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _rollbacks(run_dir: Path) -> list[str]:
    try:
        entries = read_interventions(run_dir)
        rows = [
            [str(entry["at_step"]), str(entry["to_step"]), "{}-{}".format(*entry["left_out"]), str(entry["reason"])]
            for entry in entries
        ]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return [note(f"{run_dir / INTERVENTIONS_FILE} is damaged ({error}).")]
    if not rows:
        return [note("None.")]
    return [table(["at step", "back to", "samples left out", "reason"], rows)]


def _read_and_written(run_dir: Path, config: ReportConfig, settings: RunSettings) -> list[str]:
    """What the run read, and what its model writes."""
    if isinstance(settings, FinetuneConfig):
        return [section("Outputs", *outputs_table(run_dir)), section("Rows", *rows_table(run_dir))]
    assert isinstance(settings, PretrainConfig), "there are no others"
    return [section("Samples", *_samples(run_dir, config, settings)), section("Corpus", *_corpus(settings))]


def _samples(run_dir: Path, config: ReportConfig, settings: PretrainConfig) -> list[str]:
    return [*_recorded_samples(run_dir / SAMPLES_FILE), *_continuations(run_dir, config, settings)]


def _recorded_samples(path: Path) -> list[str]:
    """The newest of the texts that were kept beside the run; nothing where there is no such file."""
    if not path.exists():
        return []
    shown: deque[str] = deque(maxlen=SAMPLES_SHOWN)
    read = broken = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            read += 1
            try:
                entry = json.loads(line)
                shown.append(folded(f"step {entry['step']:,}: {str(entry['prompt'])[:60]!r}", str(entry["text"])))
            except (ValueError, KeyError, TypeError):
                broken += 1
    left_out = read - broken - len(shown)
    notes = [note(f"{left_out:,} older ones are in {path}.")] if left_out else []
    return [*reversed(shown), *notes, *([note(f"{broken:,} lines of {path} are damaged.")] if broken else [])]


def _continuations(run_dir: Path, config: ReportConfig, settings: PretrainConfig) -> list[str]:
    """What the newest checkpoint makes of a prompt, by default the beginning of the held-out text."""
    from train.model.cost import num_parameters

    parameters, wanted = num_parameters(settings.model), config.samples
    if wanted is None and parameters > MOST_PARAMETERS:
        return [note(f"None made: a model of {parameters:,} parameters is sampled here only when samples=N asks for it.")]
    wanted = 2 if wanted is None else wanted
    if not wanted:
        return [note("None were asked for.")]
    from train.config.generate import GenerateConfig
    from train.stages.generate import run as generate

    said = io.StringIO()
    try:
        prompt = config.prompt or _held_out_beginning(settings)
        request = GenerateConfig(checkpoint=str(run_dir), prompt=prompt, num_samples=wanted, max_new_tokens=80, stream=False)
        with redirect_stdout(said), redirect_stderr(io.StringIO()):
            generate(request)
    except UserError as error:
        return [note(f"None made: {error}")]
    return [folded(f"newest checkpoint, {wanted} continuations of {prompt[:50]!r}", said.getvalue())]


def _held_out_beginning(settings: PretrainConfig) -> str:
    from data_pipeline.loader import Loader
    from data_pipeline.tokenizer import Tokenizer

    loader = Loader(settings.data, split="validation", seed=settings.run.seed, vocab_size=settings.model.vocab_size)
    return Tokenizer(loader.tokenizer_folder).decode(loader.micro_batch([0]).tokens[:PROMPT_TOKENS].tolist())


def _corpus(settings: PretrainConfig) -> list[str]:
    from data_pipeline.manifest import read_manifest

    rows, problems = [], []
    for source in settings.data.sources:
        try:
            manifest = read_manifest(source.path)
        except UserError as error:
            problems.append(note(str(error)))
            continue
        tokens = [sum(shard.num_tokens for shard in manifest.shards_of(split)) for split in ("train", "validation")]
        rows.append(
            [
                source.label,
                str(source.weight),
                f"{tokens[0]:,}",
                f"{tokens[1]:,}",
                f"{manifest.vocab_size:,}",
                manifest.fingerprint[:16],
            ]
        )
    head = ["source", "weight", "training tokens", "held-out tokens", "vocabulary", "fingerprint"]
    return [table(head, rows) if rows else "", *problems]
