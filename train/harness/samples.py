"""The samples of an lm-eval task as our examples: what was asked, answered, how likely it was and how long."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from train.harness.model import LonghaulLM
from train.scores.record import Example

Sample = Mapping[str, Any]

AGREEMENT = {"rel_tol": 1e-9, "abs_tol": 1e-12}
"""Of a mean over the examples with lm-eval's figure; sums in another order differ in the sixteenth digit."""
OVER_BYTES = ("bits_per_byte", "byte_perplexity")
"""Of a sample these are (log-likelihood, bytes)."""


def examples_of(task: Any, samples: Sequence[Sample], figures: Mapping[str, Any], model: LonghaulLM) -> list[Example]:
    """One example for each sample. task: lm-eval's; figures: its results, named metric,filter.

    A metric stands among an example's scores only where it is a figure of the example: where the mean over the examples is
    lm-eval's figure. Its samples hold log-likelihoods under the name of perplexity, and pairs under those of other metrics.
    """
    kept = {way: _means(samples, figures, way) for way in dict.fromkeys(sample["filter"] for sample in samples)}
    return [_example(task, sample, kept[sample["filter"]], model) for sample in samples]


def source_of(task: str, way: str) -> str:
    """Name of the examples of a task under a filter; the first, plain filter is called none."""
    return task if way == "none" else f"{task},{way}"


def _means(samples: Sequence[Sample], figures: Mapping[str, Any], way: str) -> frozenset[str]:
    """The metrics whose mean over the examples is lm-eval's figure."""
    of_way = [sample for sample in samples if sample["filter"] == way]
    names = dict.fromkeys(name for sample in of_way for name in sample["metrics"])
    found = set()
    for name in names:
        values = [_number(sample[name]) for sample in of_way if name in sample["metrics"]]
        value = figures.get(f"{name},{way}")
        if isinstance(value, Real) and None not in values and math.isclose(np.mean(values), value, **AGREEMENT):
            found.add(name)
    return frozenset(found)


def _number(value: Any) -> float | None:
    """The value of a metric of one sample; None for a pair and other things."""
    return float(value) if isinstance(value, Real | np.bool_) else None


def _example(task: Any, sample: Sample, means: frozenset[str], model: LonghaulLM) -> Example:
    source = source_of(task.task_name, sample["filter"])
    target, answers = sample["target"], sample["filtered_resps"]
    example = Example(
        id=f"{source}:{sample['doc_id']}",
        source=source,
        input=str(sample["arguments"][0][0]),
        truths=tuple(str(one) for one in (target if isinstance(target, list) else [target])),
        output=str(answers[0] if len(answers) == 1 else answers),
        scores={name: float(sample[name]) for name in sample["metrics"] if name in means},
    )
    fill = _BY_TYPE.get(task.OUTPUT_TYPE)  # a task of other people's code may be of several types, or of none
    return example if fill is None else fill(example, task, sample, model)


def _of_likelihood(example: Example, task: Any, sample: Sample, model: LonghaulLM) -> Example:
    value, is_greedy = sample["resps"][0][0]
    context, target = sample["arguments"][0][:2]
    said = target if is_greedy else ""  # what greedy decoding gives is known only where it is the target
    return replace(example, output=said, loss=-value, target_bytes=len(target.encode()), **_lengths(model, context, target))


def _of_rolling(example: Example, task: Any, sample: Sample, model: LonghaulLM) -> Example:
    (text,) = sample["arguments"][0][:1]
    value = sample["resps"][0][0]
    # As lm-eval counts them: of a text that it has rewritten, those of the original.
    counted = [sample[name][1] for name in OVER_BYTES if isinstance(sample.get(name), tuple | list)]
    num_bytes = counted[0] if counted else len(text.encode())
    return replace(example, output="", loss=-value, target_bytes=num_bytes, **_lengths(model, text))


def _of_choices(example: Example, task: Any, sample: Sample, model: LonghaulLM) -> Example:
    """The likeliest choice as output. Of several right ones the likeliest counts; without one there is no loss."""
    number = len(sample["arguments"])
    if "acc_mutual_info" in sample["metrics"]:
        number //= 2  # the choices once more, without a question
    asked = [(str(one[0]), str(one[1])) for one in sample["arguments"][:number]]
    values = [float(responses[0][0]) for responses in sample["resps"][:number]]
    # The choices may lie in the contexts, with one continuation for all; the truth is then the question's number.
    in_contexts = bool(getattr(task, "multiple_input", 0))
    texts = [one[0] if in_contexts else one[1] for one in asked]
    right = _places(task.doc_to_text(sample["doc"]) if in_contexts else sample["target"], texts)
    example = replace(example, output=texts[int(np.argmax(values))])
    if not right:
        return example
    place = max(right, key=values.__getitem__)
    context, target = asked[place]
    return replace(
        example,
        truths=tuple(texts[one] for one in right),
        loss=-values[place],
        target_bytes=len(target.encode()),
        **_lengths(model, context, target),
    )


def _places(target: Any, texts: Sequence[str]) -> list[int]:
    """Places of the right choices, which lm-eval gives as numbers or texts; empty where they are none of the choices."""
    bare = [text.strip() for text in texts]
    found = []
    for one in target if isinstance(target, list | tuple) else [target]:
        if isinstance(one, str):
            found += [bare.index(one.strip())] if one.strip() in bare else []
        elif isinstance(one, Integral) and 0 <= one < len(texts):
            found.append(int(one))
    return found


def _of_generation(example: Example, task: Any, sample: Sample, model: LonghaulLM) -> Example:
    lengths = [model.written[sample["arguments"][0][0], text] for text in sample["resps"][0]]
    return replace(example, input_tokens=lengths[0].input_tokens, output_tokens=sum(one.output_tokens for one in lengths))


def _lengths(model: LonghaulLM, *request: str) -> dict[str, int]:
    lengths = model.lengths[request]
    return {"input_tokens": lengths.input_tokens, "target_tokens": lengths.target_tokens}


_BY_TYPE = {
    "loglikelihood": _of_likelihood,
    "loglikelihood_rolling": _of_rolling,
    "multiple_choice": _of_choices,
    "generate_until": _of_generation,
}
