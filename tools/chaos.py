"""`longhaul chaos`: a run that meets one fault after another must be, at its end, the run that met none, to the bit.

The run is made once in peace and once under a seeded schedule of faults. Bad data (NaN gradients, spikes, a divergence) is
part of both: it changes a run, and has to change it alike.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from conf.compose import compose, validate
from conf.errors import ConfigError, UserError
from tools.chaos_faults import (
    DAMAGE,
    IN_SAVE,
    MEANING,
    Kind,
    Moment,
    Shape,
    Strike,
    detection_seconds,
    do_fault,
    ends_its_attempt,
    faults_of,
    plan_data_faults,
    plan_moments,
)
from tools.exactness import differences, num_records, summary
from tools.fault_injection import Faults
from tools.faulty_run import FAULTS_FILE, MODULE
from tools.watched_run import UnexpectedEnd, WatchedRun
from train.checkpoint.manifest import step_of, unpublished
from train.config.watchdog import WatchdogConfig
from train.outcome import last_attempt

SHOWN_DIFFERENCES = 20


@dataclass(frozen=True, kw_only=True)
class ChaosConfig:
    overrides: tuple[str, ...] = ()
    """Words of `longhaul pretrain` that make the run. Words of the command line that are no field of this come after them."""
    faults: int = 20
    """How many faults come, beside the bad data."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    """Kinds of fault, each as often as the others."""
    bad_data: bool = True
    """Put NaN gradients, spikes and a divergence into the data of both runs."""
    seed: int = 0
    """Seed of the moments and of what is struck."""
    folder: str = "chaos"
    """Folder for both runs; it must not exist yet."""
    patience_seconds: float = 180.0
    """How long a started run may take to reach the moment of its fault, or its end, before the campaign gives up."""

    def __post_init__(self) -> None:
        problems = []
        if self.faults < 1:
            problems.append(f"faults={self.faults}: must be at least 1")
        if not self.kinds:
            problems.append(f"kinds=[]: give at least one of {', '.join(get_args(Kind))}")
        if self.patience_seconds <= 0:
            problems.append(f"patience_seconds={self.patience_seconds}: must be above 0")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class Struck:
    """The disturbed run, after its last attempt or at the one that went wrong."""

    strikes: list[Strike]
    failures: list[str]


def chaos(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """The command's entry: words of the campaign and words of `longhaul pretrain`, in any order."""
    own = {item.name for item in fields(ChaosConfig)}
    mine = [word for word in overrides if word.lstrip("+").partition("=")[0] in own]
    config = validate(ChaosConfig, compose("chaos", mine, config_dir))
    return run(replace(config, overrides=(*config.overrides, *(word for word in overrides if word not in mine))), config_dir)


def run(config: ChaosConfig, config_dir: str | None = None, module: str = MODULE) -> int:
    """Run the campaign, print its table and the verdict; 0 when the disturbed run is the undisturbed one, else 1.

    `module` is what runs them. Raises UserError when the words do not make a run, the run is too short for so many faults, or
    the folder exists.
    """
    folder = Path(config.folder)
    words = [*config.overrides, f"run.folder={folder}", "budget.stop_at_step=null"]
    shape, divergence_steps = shape_of(words, config_dir, patience_seconds=config.patience_seconds)
    moments = plan_moments(config.faults, config.kinds, shape, seed=config.seed)
    data = plan_data_faults(shape, divergence_steps=divergence_steps, seed=config.seed) if config.bad_data else Faults()
    if folder.exists():
        raise UserError(f"folder={folder}: exists already; remove it, or give another one")
    command = [sys.executable, "-P", "-m", module, *words, *([f"--config-dir={config_dir}"] if config_dir else [])]
    print(f"one run in peace, then one with {config.faults} faults; both below {folder}", flush=True)
    calm = _watched(command, folder / "undisturbed", config, data)
    try:
        calm.finish()
    except UnexpectedEnd as error:
        raise UserError(f"the undisturbed run failed: {error}") from None
    finally:
        calm.close()
    restarts = [f"launch.max_restarts={2 * len(moments) + len(shape.save_steps)}", "launch.backoff_seconds=0"]
    hunted = _watched([*command, *restarts], folder / "disturbed", config, faults_of(moments, data, shape))
    struck = disturb(hunted, moments, shape, step_seconds(calm))
    failures = [*struck.failures, *judge(struck, calm, hunted)]
    print_report(struck, failures, calm, hunted)
    return int(bool(failures))


def _watched(command: Sequence[str], run_dir: Path, config: ChaosConfig, faults: Faults) -> WatchedRun:
    run_dir.mkdir(parents=True)
    faults.write(run_dir / FAULTS_FILE)
    return WatchedRun([*command, f"run.name={run_dir.name}"], run_dir, config.patience_seconds)


def shape_of(words: Sequence[str], config_dir: str | None, *, patience_seconds: float) -> tuple[Shape, int]:
    """The shape of the run that `longhaul pretrain WORDS` makes, and how many bad steps are a divergence to it.

    The final save is left out: a fault behind it would meet a run that is finished.
    Raises UserError where the watchdog would notice a hang only after the campaign has given up.
    """
    from train.initial import configure
    from train.launch import settle
    from train.plan import make_plan

    settings = configure(words, config_dir)
    _check_deadlines(settings.watchdog, patience_seconds)
    settings = settle(settings).config
    processes = settings.launch.processes
    assert processes is not None, "settle fills it in"
    plan = make_plan(settings, processes)
    every = settings.checkpoint.every_steps
    saves = tuple(range(every, plan.total_steps, every)) if every else ()
    shape = Shape(processes=processes, steps=plan.total_steps, samples=plan.total_samples, save_steps=saves)
    return shape, settings.guard.diverged_after_skips


def _check_deadlines(watchdog: WatchdogConfig, patience_seconds: float) -> None:
    deadlines = {item.name: getattr(watchdog, item.name) for item in fields(watchdog) if item.name != "grace_seconds"}
    for name, seconds in deadlines.items():
        if seconds is None or seconds >= patience_seconds:
            shown = "null" if seconds is None else f"{seconds:g}"
            raise UserError(
                f"watchdog.{name}={shown}: must be below patience_seconds={patience_seconds:g}, or the campaign gives up "
                "before a rank that stands still is noticed; lower the one or raise the other"
            )


def step_seconds(run: WatchedRun) -> float:
    """Seconds from step to step, with evaluations and saves."""
    times = [float(record["time"]) for record in run.records() if record["kind"] == "train"]
    return (times[-1] - times[0]) / max(1, len(times) - 1)


def disturb(run: WatchedRun, moments: Sequence[Moment], shape: Shape, pace_seconds: float) -> Struck:
    """Start the run, do each fault to it, start it again where it does not by itself, and let it finish."""
    left, strikes, failures = deque(moments), [], []
    try:
        with tqdm(total=len(moments), desc="faults", unit="fault", disable=None, leave=False) as bar:
            while left:
                moment = left.popleft()
                if moment.kind in IN_SAVE and moment.step <= run.newest_checkpoint():
                    left = _with_another_try(left, moment, shape)  # an attempt before got further than meant
                    continue
                ended = max((strike.attempt for strike in strikes if ends_its_attempt(strike)), default=0)
                strike = do_fault(run, moment, shape, pace_seconds=pace_seconds, ended=ended)
                if strike is None:
                    left = _with_another_try(left, moment, shape)
                    continue
                strikes.append(strike)
                bar.update()
        run.finish()
    except UnexpectedEnd as error:
        failures.append(f"attempt {last_attempt(run.run_dir)}, after {len(strikes)} faults: {error}")
    finally:
        run.close()
    return Struck(strikes=strikes, failures=failures)


def _with_another_try(left: deque[Moment], missed: Moment, shape: Shape) -> deque[Moment]:
    """`left` with the missed moment at the next save that has none; as it was where no such save is left."""
    taken = {moment.step for moment in left}
    for step in shape.save_steps:
        if step > missed.step and step not in taken:
            return deque(sorted([*left, replace(missed, step=step)], key=lambda moment: moment.step))
    return left


def judge(struck: Struck, calm: WatchedRun, hunted: WatchedRun) -> list[str]:
    """Everything that does not hold, one line each."""
    failures = [f"outlived its supervisor: {process}" for process in hunted.orphans]
    failures += [f"still listening: {port}" for port in hunted.bound_ports()]
    if struck.failures:
        return failures
    ended = [strike for strike in struck.strikes if ends_its_attempt(strike)]
    failures += _unexplained_attempts({strike.attempt for strike in ended}, hunted)
    failures += [f"{folder}: left behind without a manifest" for folder in unpublished(hunted.run_dir / "checkpoints")]
    failures += _lost_too_much(ended, hunted)
    return failures + summary(differences(calm.run_dir, hunted.run_dir), most=SHOWN_DIFFERENCES)


def _unexplained_attempts(ended: Collection[int], hunted: WatchedRun) -> list[str]:
    """Every attempt but the last has to have met a fault that ends it, and the last none. Two may meet in one attempt: while
    one rank hangs, another is killed."""
    last = last_attempt(hunted.run_dir)
    return [
        *(f"attempt {attempt} ended without a fault: see {hunted.log}" for attempt in range(1, last) if attempt not in ended),
        *([f"attempt {last} finished in spite of a fault that ends an attempt: see {hunted.log}"] if last in ended else []),
    ]


def _lost_too_much(ended: Sequence[Strike], hunted: WatchedRun) -> list[str]:
    """Attempts that went on from an older checkpoint than there was. A damaged one does not count."""
    failures, began = [], beginnings(hunted)
    quarantined = {
        step_of(Path(path.name.partition(".")[0]))
        for path in (hunted.run_dir / "checkpoints/quarantined").glob("step-*")
        if path.is_dir()
    }
    for strike in ended:
        if strike.attempt + 1 not in began:
            continue
        resumed = began[strike.attempt + 1][0] - 1
        if resumed < strike.newest and not (strike.moment.kind in DAMAGE and strike.newest in quarantined):
            failures.append(
                f"attempt {strike.attempt + 1} went on from step {resumed}, there was a checkpoint of {strike.newest}"
            )
    return failures


def beginnings(run: WatchedRun) -> dict[int, tuple[int, float]]:
    """First step of every attempt, and the time when it was done."""
    found: dict[int, tuple[int, float]] = {}
    for record in run.records():
        if record["kind"] == "train":
            found.setdefault(int(record["attempt"]), (int(record["step"]), float(record["time"])))
    return found


def print_report(struck: Struck, failures: Sequence[str], calm: WatchedRun, hunted: WatchedRun) -> None:
    """The table of faults and the verdict."""
    began = beginnings(hunted)
    print("\n| fault | kind | at step | newest checkpoint | noticed after s | stepping again after s | steps again |")
    print("|---|---|---|---|---|---|---|")
    noticed: dict[Kind, list[float]] = {}
    back: dict[Kind, list[float]] = {}
    for number, strike in enumerate(struck.strikes, start=1):
        kind = strike.moment.kind
        cells = ["-", "-", "-"]
        if ends_its_attempt(strike) and (following := began.get(strike.attempt + 1)):
            detected = detection_seconds(hunted.run_dir, strike)
            if detected is not None:
                noticed.setdefault(kind, []).append(detected)
            back.setdefault(kind, []).append(following[1] - strike.time)
            cells = [
                "-" if detected is None else f"{detected:.1f}",
                f"{back[kind][-1]:.1f}",
                f"{strike.step - following[0] + 1}",
            ]
        newest = f"{strike.newest}" + ("" if strike.torn is None else f", {strike.torn} half written")
        print(f"| {number} | {kind} | {strike.step} | {newest} | {' | '.join(cells)} |")
    print("\n| kind | times | noticed after s, median and worst | stepping again after s, median and worst | meaning |")
    print("|---|---|---|---|---|")
    for kind, count in sorted(Counter(strike.moment.kind for strike in struck.strikes).items()):
        print(f"| {kind} | {count} | {_middle(noticed.get(kind))} | {_middle(back.get(kind))} | {MEANING[kind]} |")
    print()
    for failure in failures:
        print(f"FAILED: {failure}")
    if not failures:
        print(
            f"equal to the bit after {len(struck.strikes)} faults in {last_attempt(hunted.run_dir)} attempts: "
            f"{num_records(calm.run_dir)} records, the loop's state, every weight and moment"
        )


def _middle(values: Sequence[float] | None) -> str:
    return f"{statistics.median(values):.1f}, {max(values):.1f}" if values else "-"
