"""Tasks of lm-eval within an evaluation: its results as our scores, its samples as our examples."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import NormalDist
from typing import Any

import lm_eval
import numpy as np
from lm_eval.utils import handle_non_serializable, make_table

from data_pipeline.io import sha256_of_texts
from train.config.evaluation import EvaluationConfig
from train.evaluate.engines import Engines
from train.evaluate.subject import Subject
from train.harness.model import LonghaulLM
from train.harness.samples import AGREEMENT, examples_of, source_of
from train.harness.tasks import fault, is_ours, known_tasks
from train.parallel import ParallelContext
from train.scores.intervals import bootstrap_weights, interval
from train.scores.record import Example, Score

RESULTS_FILE = "lm_eval.json"
TABLE_FILE = "lm_eval.txt"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What lm-eval found."""

    examples: list[Example]
    data: list[dict[str, Any]]
    scores: dict[str, Score]
    files: dict[str, str]
    """Its own results as it writes them, and its table."""


def run_tasks(config: EvaluationConfig, subject: Subject, engines: Engines, context: ParallelContext) -> Outcome:
    """Run the tasks. lm-eval sees one process on every rank: all of them score the samples and sum them up, but only the
    first, by LOCAL_RANK, is given the results; the outcome of the others is empty, and they spare themselves the bootstrap.

    Raises UserError for a task that is not known or damaged, or whose data cannot be read.
    """
    task = config.task
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = known_tasks(task)
    model = LonghaulLM(loaded=(subject, engines, context))
    try:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=list(task.tasks),
            num_fewshot=task.num_fewshot,
            limit=config.limit,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=config.resamples if context.is_first else 0,  # the others' results are thrown away
        )
    # A task is a program: its templates, functions and metrics raise whatever they like.
    except Exception as error:
        if is_ours(error):
            raise
        raise fault(f"task.tasks={', '.join(task.tasks)}", error) from error
    if results is None:
        return Outcome(examples=[], data=[], scores={}, files={})
    samples = results.pop("samples")
    text = json.dumps(results, indent=1, default=handle_non_serializable, ensure_ascii=False)
    examples = [
        example
        for name, found in samples.items()
        for example in examples_of(manager.loaded[name], found, results["results"][name], model)
    ]
    data = [
        {
            "name": name,
            "path": str(results["configs"][name].get("dataset_path")),
            "hash": sha256_of_texts(str(sample["doc_hash"]) + str(sample["prompt_hash"]) for sample in found),
            "examples": len(found),
        }
        for name, found in samples.items()
    ]
    files = {RESULTS_FILE: text + "\n", TABLE_FILE: make_table(results)}
    return Outcome(examples=examples, data=data, scores=scores_of(results["results"], examples, config), files=files)


def scores_of(
    results: Mapping[str, Mapping[str, Any]], examples: Sequence[Example], config: EvaluationConfig
) -> dict[str, Score]:
    """task/metric -> score. Of a mean over the examples the interval is the bootstrap's; of another figure, such as BLEU, the
    normal one of lm-eval's standard error, where it has one.

    A metric under another filter than the first, plain one is task/metric,filter.
    """
    width = NormalDist().inv_cdf(0.5 + config.confidence / 2)
    scores: dict[str, Score] = {}
    for task, found in results.items():
        for key, value in found.items():
            metric, comma, way = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            name = f"{task}/{metric}" if way == "none" else f"{task}/{metric},{way}"
            if not math.isfinite(value):
                scores[name] = Score(value=None, undefined="lm-eval gives no finite value")
                continue
            low, high = _bootstrapped(
                float(value), [one.scores for one in examples if one.source == source_of(task, way)], metric, config
            )
            error = found.get(f"{metric}_stderr,{way}")
            if low is None and isinstance(error, Real) and math.isfinite(error):
                low, high = float(value - width * error), float(value + width * error)
            scores[name] = Score(value=float(value), low=low, high=high)
    return scores


def _bootstrapped(
    value: float, found: Sequence[Mapping[str, float]], metric: str, config: EvaluationConfig
) -> tuple[float, float] | tuple[None, None]:
    """The bootstrap's interval of a figure that is the mean of the examples' own; none of one that is not."""
    if len(found) < 2 or not config.resamples or any(metric not in scores for scores in found):
        return None, None
    scores_N = np.array([scores[metric] for scores in found])
    if not math.isclose(scores_N.mean(), value, **AGREEMENT):
        return None, None
    weights = bootstrap_weights(len(scores_N), resamples=config.resamples, seed=config.seed)
    return interval(
        np.concatenate([weights_RN @ scores_N / len(scores_N) for weights_RN in weights]), confidence=config.confidence
    )
