"""`longhaul verify-resume`: whether a run on this machine, with this configuration, resumes as if nobody had disturbed it.

N steps are run twice without disturbance, and once more with a kill in the middle. Where the two undisturbed runs are equal
to the bit, the resumed one must be. Where they are not, because kernels add in any order, the noise between them is
measured, and the resumed run must lie within it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from tqdm import tqdm

from conf.compose import compose, validate
from conf.errors import ConfigError, UserError
from tools.exactness import differences, num_records, summary
from tools.fault_injection import Faults, Once
from tools.faulty_run import FAULTS_FILE, MODULE
from tools.watched_run import UnexpectedEnd, WatchedRun
from train.metrics.jsonl import FILE_NAME, read_metrics
from train.outcome import ExitCode

NOISE_FACTOR = 3.0  # two runs give one sample of the noise; the largest of N steps is rarely three times that of another
SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    overrides: tuple[str, ...] = ()
    """Words of `longhaul pretrain` that make the run. Words of the command line that are no field of this come after them."""
    steps: int = 20
    """Steps of each run; the kill comes after half of them."""
    folder: str = "verify-resume"
    """Folder for the three runs; it must not exist yet."""
    patience_seconds: float = 1800.0
    """How long a run may take before it is given up."""

    def __post_init__(self) -> None:
        problems = []
        if self.steps < 4:
            problems.append(f"steps={self.steps}: must be at least 4, two before the kill and two after it")
        if self.patience_seconds <= 0:
            problems.append(f"patience_seconds={self.patience_seconds}: must be above 0")
        if problems:
            raise ConfigError(problems)


def verify_resume(overrides: Sequence[str], config_dir: str | None = None) -> int:
    """The command's entry: words of its own and words of `longhaul pretrain`, in any order."""
    own = {item.name for item in fields(VerifyConfig)}
    mine = [word for word in overrides if word.lstrip("+").partition("=")[0] in own]
    config = validate(VerifyConfig, compose("verify_resume", mine, config_dir))
    return run(replace(config, overrides=(*config.overrides, *(word for word in overrides if word not in mine))), config_dir)


def run(config: VerifyConfig, config_dir: str | None = None, module: str = MODULE) -> int:
    """Make the runs, compare, print the verdict; 0 when the resumed run is as good as an undisturbed one, else 1.

    Raises UserError when the words do not make a run, or the folder exists.
    """
    from train.initial import configure

    folder, half = Path(config.folder), config.steps // 2
    # The schedule is made for the steps of the user's own budget: only how far it is followed is set here.
    words = [*config.overrides, f"run.folder={folder}", f"budget.stop_at_step={config.steps}", f"checkpoint.every_steps={half}"]
    words += ["launch.max_restarts=0", "monitor.wandb.mode=disabled"]
    settings = configure(words, config_dir)
    budget = settings.budget.steps
    if budget is not None and budget < config.steps:
        raise UserError(f"steps={config.steps}: the run has {budget}; lower steps, or raise budget.steps")
    if folder.exists():
        raise UserError(f"folder={folder}: exists already; remove it, or give another one")
    command = [sys.executable, "-P", "-m", module, *words, *([f"--config-dir={config_dir}"] if config_dir else [])]
    runs = {name: folder / name for name in ("first", "second", "resumed")}
    print(f"{config.steps} steps twice, and once with a kill after {half}; all below {folder}", flush=True)
    death = Once(kind="death_after_a_save", step=half + half // 2, rank=(settings.launch.processes or 1) - 1)
    try:
        for name, run_dir in tqdm(runs.items(), desc="runs", unit="run", disable=None, leave=False):
            run_dir.mkdir(parents=True)
            Faults(once=(death,) if name == "resumed" else ()).write(run_dir / FAULTS_FILE)
            _complete([*command, f"run.name={name}"], run_dir, config, killed=name == "resumed")
    except UnexpectedEnd as error:
        raise UserError(f"a run failed: {error}") from None
    return judge(runs["first"], runs["second"], runs["resumed"])


def _complete(command: Sequence[str], run_dir: Path, config: VerifyConfig, *, killed: bool) -> None:
    """Run to the last step; one that is `killed` on the way is started again."""
    watched = WatchedRun(command, run_dir, config.patience_seconds)
    try:
        if killed:
            watched.start()
            if (code := watched.wait_ended()) != ExitCode.CRASHED:
                raise UnexpectedEnd(f"exit code {code} where it was to be killed, see {watched.log}")
        watched.start()
        if (code := watched.wait_ended()) not in (ExitCode.FINISHED, ExitCode.RESUMABLE):
            raise UnexpectedEnd(f"exit code {code}, see {watched.log}")
    finally:
        watched.close()


def judge(first: Path, second: Path, resumed: Path) -> int:
    """Print what was found; 0 when the resumed run holds."""
    noise = differences(first, second)
    found = differences(first, resumed)
    if not noise:
        print(f"undisturbed runs equal to the bit: {num_records(first)} records, the loop's state, every weight and moment")
        if not found:
            print("VERIFIED: the resumed run is the undisturbed run, to the bit")
            return 0
        print("FAILED: the resumed run is not the undisturbed run, though this machine repeats itself to the bit:")
        print("\n".join(f"  {line}" for line in summary(found, most=SHOWN)))
        return 1
    expected, met = spread(first, second), spread(first, resumed)
    print(f"undisturbed runs differ in {len(noise)} places: this machine does not repeat itself to the bit")
    print("| quantity | largest difference of the undisturbed runs | of the resumed run |\n|---|---|---|")
    for name in expected:
        print(f"| {name} | {expected[name]:.3g} | {met[name]:.3g} |")
    beyond = [name for name in expected if not met[name] <= NOISE_FACTOR * expected[name]]
    if beyond:
        print(f"FAILED: beyond {NOISE_FACTOR:g} times the noise of undisturbed runs: {', '.join(beyond)}")
        return 1
    print(f"VERIFIED: the resumed run lies within {NOISE_FACTOR:g} times the noise of undisturbed runs")
    return 0


def spread(left: Path, right: Path) -> dict[str, float]:
    """Largest difference of loss and gradient norm over the steps; infinite where a step is missing."""
    records = [
        {int(record["step"]): record for record in read_metrics(folder / FILE_NAME) if record["kind"] == "train"}
        for folder in (left, right)
    ]
    if records[0].keys() != records[1].keys():
        return {"loss": math.inf, "grad_norm": math.inf}
    return {
        name: max(abs(float(records[0][step][name]) - float(records[1][step][name])) for step in records[0])
        for name in ("loss", "grad_norm")
    }
