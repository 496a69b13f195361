"""The command `lm_eval` with our model and with its own `hf` on the same weights: a local task of each output type."""

from __future__ import annotations

import inspect
import json
import math
import random
import sys
from argparse import ArgumentParser
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.errors import UserError
from tests.command import longhaul, run_module
from tests.unit.convert.checkpoints import LLAMA, write_checkpoint
from train.checkpoint.reader import CheckpointReader
from train.convert.hf_export import plan_weights, write_model

pytestmark = pytest.mark.further

TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\n",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_likelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{target}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "tiny_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}
NUM_DOCUMENTS = 9
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def write_tasks(folder: Path) -> None:
    """A task file and nine documents for each output type; texts are longer and shorter than the model's 160 tokens."""
    draw, lines = random.Random(0), [line for line in inspect.getsource(ArgumentParser).splitlines() if line.strip()]
    for name, task in TASKS.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(NUM_DOCUMENTS):
                start = draw.randrange(len(lines) - 20)
                count = draw.choice([1, 3, 12]) if name in ("tiny_rolling", "tiny_likelihood") else 2
                text = "\n".join(lines[start : start + count]) + "\n"
                choices = [draw.choice(lines).strip()[: draw.randrange(1, 20)] for _ in range(4)]
                values = {"text": text, "target": lines[start + 15][:30], "question": text, "choices": choices}
                file.write(json.dumps({**values, "answer": number % 4}) + "\n")
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        settings = {"task": name, "test_split": "test", "metadata": {"version": 1.0}, **data, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tasks/, and one model as a checkpoint below run/ and as a folder exported/, both in fp32."""
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    reader = CheckpointReader(write_checkpoint(folder / "run", LLAMA))
    (folder / "exported").mkdir()
    write_model(reader, plan_weights(reader, "fp32", shard_bytes=10**9), folder / "exported", dtype="fp32")
    return folder


def lm_eval(place: Path, model: str, arguments: str, *more: str) -> tuple[dict[str, Any], dict[str, list]]:
    """(results, samples by task) of the command, which is run as a person would."""
    out = place / f"out-{model}-{len(list(place.iterdir()))}"
    done = run_module(
        "train.harness.command:main", "lm_eval", "--model", model, "--model_args", arguments,
        "--include_path", str(place / "tasks"), "--tasks", ",".join(TASKS), "--output_path", str(out), "--log_samples",
        "--device", "cpu", *more, environment=OFFLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tiny_choice" in done.stdout
    (results,) = out.rglob("results_*.json")
    samples = {}
    for name in TASKS:
        (file,) = out.rglob(f"samples_{name}_*.jsonl")
        samples[name] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return json.loads(results.read_text(encoding="utf-8")), samples


@pytest.fixture(scope="module")
def by_hf(place: Path) -> tuple[dict[str, Any], dict[str, list]]:
    return lm_eval(place, "hf", f"pretrained={place / 'exported'},dtype=float32", "--batch_size", "4")


@pytest.mark.parametrize(
    "arguments",
    [
        "checkpoint={place}/run,batch_tokens=200",
        pytest.param("hf={place}/exported", marks=pytest.mark.campaign(name="layouts")),
        pytest.param("checkpoint={place}/run,processes=2", marks=pytest.mark.campaign(name="layouts")),
    ],
)
def test_our_model_has_the_scores_of_hf(place, by_hf, arguments):
    results, samples = lm_eval(place, "longhaul", arguments.format(place=place) + ",dtype=float32")
    expected, their_samples = by_hf
    for task in TASKS:
        figures = {key: value for key, value in results["results"][task].items() if isinstance(value, float)}
        assert figures and figures == pytest.approx({key: expected["results"][task][key] for key in figures}, rel=1e-4), task
        assert len(samples[task]) == NUM_DOCUMENTS
        for ours, theirs in zip(samples[task], their_samples[task], strict=True):
            assert ours["arguments"] == theirs["arguments"]
            _compare(ours["filtered_resps"], theirs["filtered_resps"])
    assert len(results["config"]["model_sha"]) == 64


def _compare(ours: Any, theirs: Any) -> None:
    """Answers: nested lists of likelihoods, of whether they are greedy, and of texts."""
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            _compare(one, other)
    elif isinstance(ours, str) and not ours.replace(".", "").replace("-", "").isdigit():
        assert ours == theirs
    else:
        assert float(ours) == pytest.approx(float(theirs), rel=1e-4)


def test_its_tasks_within_an_evaluation(place, by_hf, tmp_path):
    """The scores of lm-eval, its results and every sample, in one folder; two ranks share the work."""
    done = longhaul(
        "evaluate", f"checkpoint={place / 'run'}", "task=harness", f"task.tasks=[{','.join(TASKS)}]",
        f"task.include={place / 'tasks'}", "task.own_tasks=false", f"out={tmp_path / 'found'}", "processes=2",
        "wandb.mode=disabled", "dtype=fp32", "resamples=50", environment=OFFLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    kept = json.loads((tmp_path / "found" / "evaluation.json").read_text(encoding="utf-8"))
    found = {name: score["value"] for name, score in kept["scores"].items()}
    expected = by_hf[0]["results"]
    assert found == pytest.approx(
        {
            f"{task}/{key.removesuffix(',none')}": value
            for task in TASKS
            for key, value in expected[task].items()
            if isinstance(value, float) and not key.endswith("_stderr,none")
        },
        rel=1e-4,
    )
    assert kept["scores"]["tiny_choice/acc"]["low"] >= 0, "the interval of a share stays among shares"
    examples = [json.loads(line) for line in (tmp_path / "found" / "examples.jsonl").read_text().splitlines()]
    assert len(examples) == len({one["id"] for one in examples}) == len(TASKS) * NUM_DOCUMENTS
    losses = [one["loss"] for one in examples if one["source"] == "tiny_likelihood"]
    assert math.exp(sum(losses) / NUM_DOCUMENTS) == pytest.approx(found["tiny_likelihood/perplexity"], rel=1e-6)
    assert not any("perplexity" in one.get("scores", {}) for one in examples), "lm-eval's samples have a log-likelihood there"
    assert {entry["name"] for entry in kept["data"]} == set(TASKS)
    assert "tiny_choice" in (tmp_path / "found" / "lm_eval.txt").read_text()
    assert "Traceback" not in done.stderr
    assert len({one.get("output", "") for one in examples if one["source"] == "tiny_generation"}) > 3, "it wrote something"


def test_later_releases_find_it_by_its_entry_point():
    """They hand the entry point to the registry, which reads it when the name is asked for."""
    from lm_eval.api.registry import model_registry

    import train.harness.model as own

    (point,) = entry_points(group="lm_eval.models", name="longhaul")
    assert point.load() is own.LonghaulLM
    assert model_registry.get("longhaul") is own.LonghaulLM


# --- errors


def _model(place: Path, **more: Any) -> Any:
    from train.harness.model import LonghaulLM

    return LonghaulLM(checkpoint=str(place / "run"), device="cpu", **({"dtype": "fp32"} | more))


def _asked(kind: str, *arguments: Any) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_length": 1}, "max_length=1: must lie between 2 and"),
        ({"max_length": 161}, "max_length=161: must lie between 2 and the model's 160"),
        ({"max_length": "long"}, "max_length=long: must lie between 2 and the model's 160"),
        ({"dtype": "float16"}, "dtype=float16: must be one of auto, float32, bfloat16, fp32, bf16"),
        ({"processes": "abc"}, "processes=abc: must be a whole number, at least 1"),
        ({"processes": 1.5}, "processes=1.5: must be a whole number, at least 1"),
        ({"tensor": "x"}, "tensor=x: must be a whole number, at least 1"),
        ({"batch_tokens": 0}, "batch_tokens=0: must be a whole number, at least 1"),
        ({"verify": "maybe"}, "verify=maybe: must be true or false"),
        ({"size": 3}, "size: no such setting; there are checkpoint, hf"),
        ({"hf": "somewhere"}, "exactly one of"),
        ({"processes": 3, "tensor": 2}, "tensor=2: must divide processes=3"),
        ({"processes": 3, "tensor": 3}, "tensor=3: must divide the checkpoint's kv_heads"),
    ],
)
def test_settings_that_do_not_fit(place, settings, words):
    with pytest.raises(UserError, match=words):
        _model(place, **settings)


@pytest.mark.parametrize(("word", "dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bf16", "bfloat16")])
def test_dtypes_have_the_names_of_hf_too(place, word, dtype):
    assert _model(place, dtype=word).get_model_info()["model_dtype"] == f"torch.{dtype}"


def test_requests_that_do_not_fit(place):
    model = _model(place, max_length=8)
    with pytest.raises(UserError, match="a continuation of .* tokens: needs at least 1, and at most the 8"):
        model.loglikelihood(_asked("loglikelihood", "x", "return the text of nothing" * 3), disable_tqdm=True)
    with pytest.raises(UserError, match="max_gen_toks=8: leaves no room"):
        model.generate_until(_asked("generate_until", "x", {"max_gen_toks": 8}), disable_tqdm=True)
    with pytest.raises(UserError, match="num_beams: not known here"):
        model.generate_until(_asked("generate_until", "x", {"max_gen_toks": 4, "num_beams": 2}), disable_tqdm=True)
    with pytest.raises(UserError, match="no chat template"):
        model.apply_chat_template([{"role": "user", "content": "x"}])


def test_the_command_tells_an_error_in_one_line(place):
    done = run_module(
        "train.harness.command:main", "lm_eval", "--model", "longhaul", "--model_args", "checkpoint=nowhere",
        "--include_path", str(place / "tasks"), "--tasks", "tiny_choice", environment=OFFLINE,
    )  # fmt: skip
    script = Path(sys.executable).with_name("lm_eval").read_text(encoding="utf-8")
    assert "from train.harness.command import main" in script, "lm-eval's own script of this name knows no models of ours"
    assert done.returncode == 93
    assert "lm_eval: checkpoint=nowhere: no such folder" in done.stderr and "Traceback" not in done.stderr
