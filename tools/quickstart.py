"""What tools/quickstart.sh decides and says: how much of everything this machine gets done in minutes, and what came of it.

`python -m tools.quickstart size RUN SECONDS_SO_FAR` reads how fast the first steps of the run were, writes sizes.json beside
them and says how long all will take; a folder that has a sizes.json keeps it. `sizes RUN` prints
them for the shell, `proof REPORT` the losses of a proof, `scores TASKS RUN` what the tasks reached. No stage is cut off
by a clock: what is read follows from the two measured numbers alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from conf.errors import UserError
from data_pipeline.io import read_json, write_json
from train.metrics.jsonl import FILE_NAME, read_metrics

SIZES_FILE = "sizes.json"
WARM_STEPS = 5  # of the first ones, that fill caches and are not counted
STEP_TOKENS = {"pretrain": 1024, "classification": 1024, "summarisation": 2048}
"""Tokens of a step in the three experiments."""
SECONDS = {"pretrain": 120.0, "classification": 60.0, "summarisation": 80.0}
"""What each training may take."""
STEPS = {"pretrain": (400, 1500), "classification": (150, 500), "summarisation": (100, 300)}
"""Fewer teach too little; more keep a quick machine for little."""
ROWS = (200, 400)  # on which a task is measured: the most where the summarisation gets all its steps

STARTS, STARTS_OF_A_ROW = 10.0, 0.01
"""All else, counted in starts of a command, which it is made of. Two busy AVX2 cores that started one in 47 s and trained 1,856
tokens/s took 985 s, with 200 rows; this says 989."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of this machine, as the first steps showed it."""

    tokens_per_second: float
    """Of pretraining, all ranks together."""
    start_seconds: float
    """From the start of the ranks to the end of their first step: imports above all, which every stage has."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Steps of the three trainings, rows that a task is measured on, and how long all that will take."""

    pretrain_steps: int
    classification_steps: int
    summarisation_steps: int
    rows: int
    seconds_left: int


def sizes_for(speed: Speed) -> Sizes:
    """What fits into the time at this speed, and the least of everything where nothing fits."""
    steps = {
        name: min(most, max(least, round(SECONDS[name] * speed.tokens_per_second / STEP_TOKENS[name])))
        for name, (least, most) in STEPS.items()
    }
    least, most = STEPS["summarisation"]
    rows = round(ROWS[0] + (ROWS[1] - ROWS[0]) * (steps["summarisation"] - least) / (most - least))
    tokens = sum(steps[name] * STEP_TOKENS[name] for name in steps)
    seconds = tokens / speed.tokens_per_second + (STARTS + rows * STARTS_OF_A_ROW) * speed.start_seconds
    return Sizes(
        pretrain_steps=steps["pretrain"],
        classification_steps=steps["classification"],
        summarisation_steps=steps["summarisation"],
        rows=rows,
        seconds_left=round(seconds),
    )


def speed_of(records: Sequence[Mapping[str, object]], created: float) -> Speed:
    """From the records of a run's first attempt and the time that its folder was made.

    Raises UserError for a run that is too short to tell.
    """
    steps = [record for record in records if record["kind"] == "train"]
    if len(steps) <= WARM_STEPS:
        raise UserError(f"the run has {len(steps)} steps; {WARM_STEPS + 1} are needed to know this machine's speed")
    rates = [float(str(record["tokens_per_second"])) for record in steps[WARM_STEPS:]]
    return Speed(tokens_per_second=median(rates), start_seconds=float(str(steps[0]["time"])) - created)


def size(run: Path, so_far: float) -> None:
    """Decide, write sizes.json and say how long it will take; where there is one already, say what it holds."""
    path = run / SIZES_FILE
    if first := not path.exists():
        speed = speed_of(read_metrics(run / FILE_NAME), float(read_json(run / "run.json")["created"]))
        write_json(path, {**asdict(speed), **asdict(sizes_for(speed))})
    found = read_json(path)
    print(
        f"\nthis machine trains {found['tokens_per_second']:,.0f} tokens/s and starts a command in "
        f"{found['start_seconds']:.0f} s, so the main job reads {found['pretrain_steps'] * STEP_TOKENS['pretrain']:,} tokens,\n"
        f"fine-tunes for {found['classification_steps']} and {found['summarisation_steps']} steps, and measures on "
        f"{found['rows']} rows a task: decided in {path}"
    )
    if first:
        total = (so_far + found["seconds_left"]) / 60
        print(f"forecast: {total:.1f} minutes for the main job, of which {found['seconds_left'] / 60:.1f} from here")


def shown_proof(report: Mapping[str, dict]) -> str:
    """The losses of both sides. Raises UserError where the proof does not hold."""
    if not report["proved"]:
        raise UserError("the export is not proved: transformers does not compute what the run does")
    loss = report["proof"]["held_out_loss"]
    return f"held-out loss    {loss['longhaul']:.6f} here, {loss['transformers']:.6f} in transformers"


@dataclass(frozen=True, kw_only=True)
class Task:
    """How a task's figures are found and shown; the first figure is the one that is judged."""

    name: str
    figures: tuple[str, ...]


TASKS = {
    "classification": Task(name="package", figures=("accuracy", "f1_macro")),
    "summarisation": Task(name="first_line", figures=("rouge1", "rougeL")),
}


def score_lines(found: Mapping[str, Mapping[str, Mapping[str, dict]]]) -> list[str]:
    """A table of task -> means -> figure -> score, and a sentence for each task: is the model above the simple means?

    The last of a task's means is the fine-tuned model, the one before it the model without.
    """
    lines = [f"{'on files that no model has read':<44}{'figure':<10}value and 95% interval"]
    verdicts = []
    for task, means in found.items():
        for title, scores in means.items():
            for figure in TASKS[task].figures:
                score = scores[figure]
                interval = f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
                lines.append(f"{task:<16}{title:<28}{figure:<10}{interval}")
        figure = TASKS[task].figures[0]
        *simple, _, after = means
        best = max(simple, key=lambda title: means[title][figure]["value"])
        values = {title: means[title][figure]["value"] for title in (best, after)}
        where = "above" if values[after] > values[best] else "BELOW"
        verdicts.append(
            f"{task}: the fine-tuned model is {where} the best of the simple means, {figure} {values[after]:.3f} against "
            f"{values[best]:.3f} of '{best}'"
        )
    return [*lines, "", *verdicts]


def scores(tasks: Path, run: Path) -> None:
    """Print what simple means, the model before and the model after reach."""
    found = {}
    for task, shown in TASKS.items():
        means = dict(read_json(tasks / task / "baseline.json")["scores"])
        for folder, title in ((run, "before fine-tuning"), (run.with_name(f"{run.name}_{task}"), "after fine-tuning")):
            means[title] = read_json(folder / "evaluations" / shown.name / "evaluation.json")["scores"]
        found[task] = means
    print("", *score_lines(found), sep="\n")


def main(words: Sequence[str]) -> int:
    """Do what the first word says; an error is one line and exit code 1."""
    try:
        match words:
            case ["size", run, so_far]:
                size(Path(run), float(so_far))
            case ["sizes", run]:
                found = read_json(Path(run) / SIZES_FILE)
                names = ("pretrain_steps", "classification_steps", "summarisation_steps", "rows")
                print(*(found[name] for name in names))
            case ["proof", report]:
                print(shown_proof(read_json(Path(report))))
            case ["scores", tasks, run]:
                scores(Path(tasks), Path(run))
            case _:
                raise UserError(f"{' '.join(words)}: unknown; this module serves tools/quickstart.sh")
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
