"""`longhaul report`: a run as one page: its curves, its attempts, where its time went, what it was made of.

With wandb=true the records go to Weights & Biases instead, under the run's own id.
"""

from __future__ import annotations

import io
import json
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conf.compose import read_config, to_plain
from conf.errors import ConfigError, UserError
from tools.curves import Chart, Curve, draw
from tools.page import bar, charts, folded, note, page, section, table, tiles
from train.config.pretrain import PretrainConfig
from train.metrics.goodput import CATEGORIES
from train.metrics.jsonl import FILE_NAME, read_lines
from train.outcome import last_attempt, read_outcome

NORMS_SHOWN = 8
MOST_PARAMETERS = 200_000_000  # of a model that is sampled without being asked for
PROMPT_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    run: str = ""
    """Folder of a run, such as runs/first."""
    out: str | None = None
    """Folder for the page and its pictures; null: report/ in the run's folder."""
    samples: int | None = None
    """Continuations by the newest checkpoint; null: 2 of a small model, none of a large one."""
    prompt: str | None = None
    """What they continue; null: the beginning of the held-out text."""
    wandb: bool = False
    """Send the records to Weights & Biases, under the run's own id, and write no page."""

    def __post_init__(self) -> None:
        if not self.run:
            raise ConfigError(["run: needs the folder of a run; give run=runs/NAME"])
        if self.samples is not None and self.samples < 0:
            raise ConfigError([f"samples={self.samples}: must not be negative; 0 makes none"])


@dataclass(kw_only=True)
class History:
    """What metrics.jsonl says, one column each; of a step the last line counts."""

    train: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    restarts: list[int] = field(default_factory=list)
    """First steps of the attempts after the first."""
    rollbacks: list[int] = field(default_factory=list)
    """Steps at which the run went back within an attempt."""
    steps_again: int = 0
    """Lines that a later one replaced."""

    @staticmethod
    def read(path: Path) -> History:
        """Read in one pass. Raises UserError for a file that is missing or broken."""
        history, attempt, step = History(), None, 0
        for record in read_lines(path):
            number = int(record["step"])
            if record["kind"] == "evaluation":
                history.evaluations[number] = record
                continue
            history.steps_again += number in history.train
            history.train[number] = record
            if attempt is not None and record["attempt"] != attempt:
                history.restarts.append(number)
            elif number <= step:
                history.rollbacks.append(step)
            attempt, step = record["attempt"], number
        return history

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of the records that have `name`."""
        found = [(step, record[name]) for step, record in sorted(self.train.items()) if name in record]
        return [step for step, _ in found], [float(value) for _, value in found]

    @property
    def last(self) -> dict[str, Any]:
        """The record of the last step; empty without any."""
        return self.train[max(self.train)] if self.train else {}


def run(config: ReportConfig) -> int:
    """Write the page, or send the records; returns 0.

    Raises UserError for a folder that is no run's, and what sending can meet.
    """
    run_dir = Path(config.run)
    settings = read_config(PretrainConfig, run_dir / "config.yaml")
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


def _send(run_dir: Path, settings: PretrainConfig) -> int:
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
    print(f"sent             {replay(run_dir, monitor, identity=identity)}")
    return 0


def _run_record(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is {run_dir} the folder of a run?") from None


def make_charts(history: History) -> list[Chart]:
    """The charts for which there are values."""
    marks = {
        "restart": history.restarts,
        "rollback": history.rollbacks,
        "spike": [step for step, record in history.train.items() if record.get("spike")],
        "skipped": [step for step, record in history.train.items() if record.get("skipped")],
    }
    marks = {kind: steps for kind, steps in marks.items() if steps}

    def curve(name: str, label: str, *, scale: float = 1.0) -> Curve:
        steps, values = history.column(name)
        return Curve(label=label, steps=steps, values=[scale * value for value in values])

    held_out = sorted(history.evaluations.items())
    scores = [float(record["loss"]) for _, record in held_out]
    losses = [
        curve("loss", "training"),
        Curve(label="held out", steps=[step for step, _ in held_out], values=scores, points=True),
    ]
    norms = sorted({key for record in history.train.values() for key in record if key.startswith("norm/weight.")})
    stopped = {"restart": history.restarts} if history.restarts else {}
    rate = [curve("tokens_per_second", "all devices")]
    shares = [curve("mfu", "full attention", scale=100), curve("mfu_causal", "causal attention", scale=100)]
    weights = [curve(key, key.removeprefix("norm/weight.")) for key in _spread(norms)]
    state = [curve(f"norm/{kind}", kind) for kind in ("exp_avg", "exp_avg_sq", "momentum")]
    busy = [curve("busy_seconds_median", "median rank"), curve("busy_seconds_max", "slowest rank")]
    clipped = [curve("grad_norm", "before clipping")]
    charts = [
        Chart(name="loss", title="loss", unit="nats per token", curves=losses, marks=marks),
        Chart(name="lr", title="learning rate", unit="", curves=[curve("lr", "learning rate")]),
        Chart(name="grad_norm", title="gradient norm", unit="", curves=clipped, logarithmic=True, marks=marks),
        Chart(name="throughput", title="throughput", unit="tokens/s", curves=rate, marks=stopped),
        Chart(name="mfu", title="model FLOPs utilisation", unit="%", curves=shares),
        Chart(name="memory", title="memory of the first rank", unit="GiB", curves=[curve("memory_gib", "memory")]),
        Chart(name="norms", title="weight norms", unit="", curves=weights, logarithmic=True),
        Chart(name="state_norms", title="optimizer state norms", unit="", curves=state, logarithmic=True),
        Chart(name="busy", title="computing time of a step", unit="s", curves=busy),
        Chart(name="stall", title="held up by a checkpoint", unit="s", curves=[curve("checkpoint_stall_seconds", "stall")]),
        Chart(name="goodput", title="goodput", unit="%", curves=[curve("goodput", "goodput", scale=100)]),
    ]
    filled = []
    for chart in charts:
        curves = [one for one in chart.curves if len(one.values)]
        if curves:
            filled.append(replace(chart, curves=curves))
    return filled


def _spread(names: list[str]) -> list[str]:
    """At most NORMS_SHOWN of them, evenly over the layers."""
    ordered = sorted(names, key=lambda name: [int(part) if part.isdigit() else part == "head" for part in name.split(".")[-1:]])
    if len(ordered) <= NORMS_SHOWN:
        return ordered
    return [ordered[round(index * (len(ordered) - 1) / (NORMS_SHOWN - 1))] for index in range(NORMS_SHOWN)]


def _lead(run_dir: Path) -> str:
    record = _run_record(run_dir)
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    created = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.get("created", 0)))
    return f"{record.get('run_id', '')}, begun {created}, commit {(record.get('git_commit') or 'unknown')[:12]}, {versions}"


def _sections(config: ReportConfig, settings: PretrainConfig, history: History, drawn: list[str]) -> list[str]:
    run_dir = Path(config.run)
    return [
        tiles(_facts(run_dir, history)),
        section("Curves", charts(drawn) if drawn else note("No step has been recorded yet.")),
        section("Where the time went", *_time(history)),
        section("Attempts", _attempts(run_dir)),
        section("Rollbacks", *_rollbacks(run_dir)),
        section("Samples", *_samples(run_dir, config, settings)),
        section("Corpus", *_corpus(settings)),
        section("Configuration", folded("config.yaml", (run_dir / "config.yaml").read_text(encoding="utf-8"))),
    ]


def _facts(run_dir: Path, history: History) -> dict[str, str]:
    last = history.last
    best = min((float(record["loss"]) for record in history.evaluations.values()), default=None)
    outcome = read_outcome(run_dir, last_attempt(run_dir)) if last_attempt(run_dir) else None
    return {
        "state": outcome.state if outcome else "running, or cut off",
        "step": f"{last['step']:,}" if last else "-",
        "tokens": f"{last['tokens']:,}" if "tokens" in last else "-",
        "training loss": f"{float(last['loss']):.4f}" if "loss" in last else "-",
        "best held-out loss": "-" if best is None else f"{best:.4f}",
        "tokens/s": f"{float(last['tokens_per_second']):,.0f}" if "tokens_per_second" in last else "-",
        "goodput": f"{100 * float(last['goodput']):.1f} %" if "goodput" in last else "-",
        "skipped steps": str(sum(int(record.get("skipped", 0)) for record in history.train.values())),
        "spikes": str(sum(int(record.get("spike", 0)) for record in history.train.values())),
        "steps done again": f"{history.steps_again:,}",
    }


def _time(history: History) -> list[str]:
    seconds = {name: float(history.last.get(f"seconds_{name}", 0.0)) for name in CATEGORIES}
    total = sum(seconds.values())
    if not total:
        return [note("Nothing was recorded of it.")]
    colours = dict(zip(CATEGORIES, ("#3f9e6e", "#c0504d", "#d97706", "#3b82c4", "#7c6bc4", "#8888"), strict=True))
    meaning = {
        "productive": "steps that count",
        "lost": "steps that had to be done again",
        "restart": "from an attempt's start to its first step",
        "checkpoint": "the loop held up by a checkpoint",
        "evaluation": "reading the held-out text",
        "idle": "no attempt was running",
    }
    rows = [[name, f"{value:,.1f}", f"{100 * value / total:.2f} %", meaning[name]] for name, value in seconds.items()]
    return [
        bar({name: value / total for name, value in seconds.items()}, colours),
        table(["time", "seconds", "share", "what it is"], rows),
    ]


def _attempts(run_dir: Path) -> str:
    rows = []
    for number in range(1, last_attempt(run_dir) + 1):
        outcome = read_outcome(run_dir, number)
        if outcome is None:
            rows.append([str(number), "-", "no outcome", "it was cut off, or is running", "-", "-"])
            continue
        ended = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(outcome.time))
        step = "-" if outcome.step is None else f"{outcome.step:,}"
        rows.append([str(number), ended, outcome.state, outcome.reason, step, outcome.host])
    return table(["attempt", "ended", "state", "reason", "step", "host"], rows)


def _rollbacks(run_dir: Path) -> list[str]:
    path = run_dir / "interventions.json"
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    if not entries:
        return [note("None.")]
    rows = [
        [str(entry["at_step"]), str(entry["to_step"]), "{}-{}".format(*entry["left_out"]), entry["reason"]] for entry in entries
    ]
    return [table(["at step", "back to", "samples left out", "reason"], rows)]


def _samples(run_dir: Path, config: ReportConfig, settings: PretrainConfig) -> list[str]:
    """What the newest checkpoint makes of a prompt, by default the beginning of the held-out text."""
    from train.model.cost import num_parameters

    parameters, wanted = num_parameters(settings.model), config.samples
    if wanted is None and parameters > MOST_PARAMETERS:
        return [note(f"None: a model of {parameters:,} parameters is sampled here only when samples=N asks for it.")]
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
        return [note(f"None: {error}")]
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
