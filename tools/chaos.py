"""`longhaul chaos`: a run that is killed again and again must be, at its end, the run that nobody disturbed, to the bit.

The run is made once in peace and once under SIGKILL at seeded moments: after a step, a fraction of a step later, or inside
the save of a checkpoint. What is killed is the machine (every process at once), the supervisor alone (its ranks have to end
by themselves), or one rank alone (the supervisor has to start the attempt again).
"""

from __future__ import annotations

import random
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from conf.compose import compose, validate
from conf.errors import ConfigError, UserError
from tools.exactness import differences, num_records
from tools.watched_run import PUBLISHED, UnexpectedEnd, WatchedRun
from train.checkpoint.manifest import unpublished
from train.outcome import last_attempt

Victim = Literal["machine", "supervisor", "rank"]
SHOWN_DIFFERENCES = 20


@dataclass(frozen=True, kw_only=True)
class ChaosConfig:
    overrides: tuple[str, ...] = ()
    """Words of `longhaul pretrain` that make the run. Words of the command line that are no field of this come after them."""
    kills: int = 20
    """How often the run is killed."""
    kills_in_save: int = 5
    """How many of these must come inside the save of a checkpoint; a kill that came too late is made up for at a later save."""
    seed: int = 0
    """Seed of the moments and of what is killed."""
    folder: str = "chaos"
    """Folder for both runs; it must not exist yet."""
    patience_seconds: float = 180.0
    """How long a started run may take to reach the moment of its kill, or its end, before the campaign gives up."""

    def __post_init__(self) -> None:
        problems = []
        if self.kills < 1:
            problems.append(f"kills={self.kills}: must be at least 1")
        if not 0 <= self.kills_in_save <= self.kills:
            problems.append(f"kills_in_save={self.kills_in_save}: must lie between 0 and kills={self.kills}")
        if self.patience_seconds <= 0:
            problems.append(f"patience_seconds={self.patience_seconds}: must be above 0")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a kill comes, and to whom. `fraction` of a step after the step's end, or that far into a save."""

    step: int
    in_save: bool
    victim: Victim
    fraction: float


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What a kill met."""

    moment: Moment
    attempt: int
    seconds: float
    """Since the attempt was started."""
    step: int
    """Last step that the attempt had written."""
    save: int | None
    """Step of the checkpoint whose save it interrupted."""


@dataclass(frozen=True, kw_only=True)
class Killed:
    """The disturbed run, after its last attempt or at the one that went wrong."""

    kills: list[Kill]
    failures: list[str]


def chaos(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """The command's entry: words of the campaign and words of `longhaul pretrain`, in any order."""
    own = {item.name for item in fields(ChaosConfig)}
    mine = [word for word in overrides if word.lstrip("+").partition("=")[0] in own]
    config = validate(ChaosConfig, compose("chaos", mine, config_dir))
    return run(replace(config, overrides=(*config.overrides, *(word for word in overrides if word not in mine))), config_dir)


def run(config: ChaosConfig, config_dir: str | None = None) -> int:
    """Run the campaign, print its table and the verdict; 0 when the killed run is the undisturbed one, else 1.

    Raises UserError when the words do not make a run, the run is too short for so many kills, or the folder exists.
    """
    folder = Path(config.folder)
    words = [*config.overrides, f"run.folder={folder}", "budget.stop_at_step=null"]
    shape = shape_of(words, config_dir)
    moments = plan_moments(config, shape)
    if folder.exists():
        raise UserError(f"folder={folder}: exists already; remove it, or give another one")
    command = [sys.executable, "-P", "-m", "tools.cli", "pretrain", *words]
    command += ["--config-dir", config_dir] if config_dir else []
    print(f"one run in peace, then {config.kills} kills, {config.kills_in_save} inside a save; both below {folder}", flush=True)
    calm = WatchedRun([*command, "run.name=undisturbed"], folder / "undisturbed", config.patience_seconds)
    try:
        calm.finish()
    except UnexpectedEnd as error:
        raise UserError(f"the undisturbed run failed: {error}") from None
    finally:
        calm.close()
    restarts = [f"launch.max_restarts={len(moments) + len(shape.save_steps)}", "launch.backoff_seconds=0"]
    hunted = WatchedRun([*command, *restarts, "run.name=disturbed"], folder / "disturbed", config.patience_seconds)
    killed = disturb(hunted, moments, shape, step_seconds(calm))
    failures = [*killed.failures, *judge(killed, config, calm, hunted)]
    print_report(killed, failures, calm, hunted)
    return int(bool(failures))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the campaign has to know of the run: its ranks, its steps, and the steps that end with a save."""

    processes: int
    steps: int
    save_steps: tuple[int, ...]


def shape_of(words: Sequence[str], config_dir: str | None) -> Shape:
    """The shape of the run that `longhaul pretrain WORDS` makes. The final save is left out: a kill behind it would meet
    a run that is finished.
    """
    from data_pipeline.facts import inspect_sources
    from train.config.pretrain import PretrainConfig
    from train.launch import settle
    from train.plan import make_plan

    settings = validate(PretrainConfig, compose("pretrain", words, config_dir))
    settings = settle(settings, inspect_sources(settings.data))
    processes = settings.launch.processes
    assert processes is not None, "settle fills it in"
    steps = make_plan(settings, processes).total_steps
    every = settings.checkpoint.every_steps
    return Shape(processes=processes, steps=steps, save_steps=tuple(range(every, steps, every)) if every else ())


def plan_moments(config: ChaosConfig, shape: Shape) -> list[Moment]:
    """Seeded moments, spread over the run. Their steps rise, so that each attempt gets further and the last one finishes."""
    if config.kills_in_save > len(shape.save_steps) or config.kills > shape.steps - 2:
        raise UserError(
            f"kills={config.kills}, kills_in_save={config.kills_in_save}: the run has {shape.steps} steps and "
            f"{len(shape.save_steps)} saves before its end, and each kill needs one of its own; give a longer budget.steps, "
            "a lower checkpoint.every_steps, or fewer kills"
        )
    draw = random.Random(config.seed)
    at_saves = set(draw.sample(shape.save_steps, config.kills_in_save))
    free = [step for step in range(1, shape.steps - 1) if step not in at_saves]
    at_steps = set(draw.sample(free, config.kills - config.kills_in_save))
    # A supervisor that dies takes its ranks along, but a moment later, when a small save may be over.
    victims: dict[bool, tuple[Victim, ...]] = {True: ("machine", "rank"), False: ("machine", "supervisor", "rank")}
    return [
        Moment(step=step, in_save=step in at_saves, victim=draw.choice(victims[step in at_saves]), fraction=draw.random())
        for step in sorted(at_saves | at_steps)
    ]


def step_seconds(run: WatchedRun) -> float:
    """Seconds from step to step, with evaluations and saves."""
    times = [float(record["time"]) for record in run.records() if record["kind"] == "train"]
    return (times[-1] - times[0]) / max(1, len(times) - 1)


def disturb(run: WatchedRun, moments: Sequence[Moment], shape: Shape, pace_seconds: float) -> Killed:
    """Start the run, kill it at each moment, start it again, and let it finish."""
    left, kills, failures = deque(moments), [], []
    try:
        with tqdm(total=len(moments), desc="kills", unit="kill", disable=None, leave=False) as bar:
            while left:
                moment = left.popleft()
                if moment.in_save and moment.step <= run.newest_checkpoint():
                    kill = None  # the attempt before got further than meant
                else:
                    kill = strike(run, moment, attempt=len(kills) + 1, shape=shape, pace_seconds=pace_seconds)
                    kills.append(kill)
                    bar.update()
                if moment.in_save and (kill is None or kill.save is None):
                    left = _with_another_try(left, moment, shape)
        run.finish()
    except UnexpectedEnd as error:
        failures.append(f"attempt {len(kills) + 1}, which nobody had touched yet: {error}")
    finally:
        run.close()
    return Killed(kills=kills, failures=failures)


def strike(run: WatchedRun, moment: Moment, *, attempt: int, shape: Shape, pace_seconds: float) -> Kill:
    """Start the run where it does not run, wait for the moment, kill."""
    began = time.time()
    run.start()
    ranks = run.wait_for_ranks(attempt, shape.processes)
    run.wait(lambda: run.last_step(attempt) >= moment.step, f"step {moment.step} was reached")
    if moment.in_save:
        # A save writes a file for each rank, two small ones and the tokenizer's folder before its manifest.
        files = 1 + int(moment.fraction * (shape.processes + 3))
        run.wait(lambda: run.files_of_save(moment.step, began) >= files, f"step {moment.step} was saved", every_seconds=1e-4)
    else:
        time.sleep(moment.fraction * pace_seconds)
    seconds = time.time() - began
    if moment.victim == "machine":
        run.kill_all(ranks)
    elif moment.victim == "supervisor":
        run.kill_supervisor()
    else:
        run.kill_rank(ranks[int(moment.fraction * 1000) % shape.processes])
    torn = [step for step in shape.save_steps if 0 < run.files_of_save(step, began) < PUBLISHED]
    step = run.last_step(attempt)
    return Kill(moment=moment, attempt=attempt, seconds=seconds, step=step, save=max(torn, default=None))


def _with_another_try(left: deque[Moment], missed: Moment, shape: Shape) -> deque[Moment]:
    """`left` with the missed moment at the next save that has none; as it was where no such save is left."""
    taken = {moment.step for moment in left}
    for step in shape.save_steps:
        if step > missed.step and step not in taken:
            return deque(sorted([*left, replace(missed, step=step)], key=lambda moment: moment.step))
    return left


def judge(killed: Killed, config: ChaosConfig, calm: WatchedRun, hunted: WatchedRun) -> list[str]:
    """Everything that does not hold, one line each."""
    failures = [f"outlived its supervisor: {process}" for process in hunted.orphans]
    if killed.failures:
        return failures
    in_save = sum(kill.save is not None for kill in killed.kills)
    if in_save < config.kills_in_save:
        failures.append(f"{in_save} of {config.kills_in_save} kills fell inside a save; lengthen the run or change the seed")
    attempts = last_attempt(hunted.run_dir)
    if attempts != len(killed.kills) + 1:
        failures.append(f"{attempts} attempts for {len(killed.kills)} kills: an attempt crashed by itself, see {hunted.log}")
    failures += [f"{folder}: left behind without a manifest" for folder in unpublished(hunted.run_dir / "checkpoints")]
    found = differences(calm.run_dir, hunted.run_dir)
    failures += found[:SHOWN_DIFFERENCES]
    if len(found) > SHOWN_DIFFERENCES:
        failures.append(f"and {len(found) - SHOWN_DIFFERENCES:,} more differences")
    return failures


def print_report(killed: Killed, failures: Sequence[str], calm: WatchedRun, hunted: WatchedRun) -> None:
    """The table of kills and the verdict."""
    resumed: dict[int, int] = {}
    for record in hunted.records():
        resumed.setdefault(int(record["attempt"]), int(record["step"]) - 1)
    print("\n| kill | killed | after s | at step | inside a save | resumed from | steps again |\n|---|---|---|---|---|---|---|")
    for kill in killed.kills:
        start = resumed.get(kill.attempt + 1)
        again = "-" if start is None else kill.step - start
        save = "no" if kill.save is None else f"yes, of step {kill.save}"
        print(f"| {kill.attempt} | {kill.moment.victim} | {kill.seconds:.1f} | {kill.step} | {save} | {start} | {again} |")
    print()
    for failure in failures:
        print(f"FAILED: {failure}")
    if not failures:
        in_save = sum(kill.save is not None for kill in killed.kills)
        print(
            f"equal to the bit after {len(killed.kills)} kills, {in_save} of them inside a save: {num_records(calm.run_dir)} "
            "records, the loop's state, every weight and moment"
        )
