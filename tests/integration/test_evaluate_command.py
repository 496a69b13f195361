"""`longhaul evaluate` from the command line to its files: on one rank and several, against transformers, stopped, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.errors import UserError
from conf.schema import leaf_names
from data_pipeline.corpus import Corpus
from tests.command import longhaul
from tests.integration.runs import SEQUENCE, WORDS
from tests.timeouts import scaled
from tools.cli import main
from train.config.evaluation import EvaluationConfig
from train.scores.intervals import measure
from train.scores.record import Evaluation, Example, find_evaluations, read_evaluation
from train.scores.settings import ScoreSettings
from train.scores.sheet import tallies
from train.stoppable import Stopped

pytestmark = pytest.mark.further

PLAIN = ("device=cpu", "dtype=fp32", "wandb.mode=disabled", "resamples=50")


def command(*words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "tools.cli", *words]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Of a model this small several only wait for each other, where other programs run as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def evaluated(out: Path, *words: str) -> Evaluation:
    """What the command keeps in `out`, run in this process: torch is imported once for all."""
    assert main(["evaluate", f"out={out}", *PLAIN, *words]) == 0
    return read_evaluation(out)


@pytest.fixture(scope="module")
def run_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    words = [*WORDS, f"data.sources=[{{path: {corpus}}}]", f"run.folder={folder}", "run.name=first"]
    done = longhaul("pretrain", *words, "budget.steps=4", "schedule.warmup_steps=1", "evaluate.every_steps=null")
    assert done.returncode == 0, done.stderr + done.stdout
    return folder / "first"


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    out = run_dir.parent / "exported"
    assert main(["export", f"checkpoint={run_dir}", f"out={out}", "dtype=fp32", "proof=false"]) == 0
    return out


@pytest.fixture(scope="module")
def alone(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Of the run's own held-out text, by one rank."""
    return evaluated(tmp_path_factory.mktemp("alone") / "out", f"checkpoint={run_dir}")


def values(evaluation: Evaluation) -> dict[str, float | None]:
    return {name: score.value for name, score in evaluation.scores.items()}


# --- texts


@pytest.mark.parametrize("words", [["processes=2"], ["processes=2", "tensor=2"]], ids=" ".join)
def test_any_number_of_ranks_finds_the_same(run_dir: Path, alone: Evaluation, tmp_path: Path, words: list[str]) -> None:
    sizes = ["batch_tokens=272", f"out={tmp_path / 'out'}"]  # eight rows and a half: the last batch is not full
    done = longhaul("evaluate", f"checkpoint={run_dir}", *PLAIN, *words, *sizes)
    assert done.returncode == 0, done.stderr
    together = read_evaluation(tmp_path / "out")
    assert values(together) == pytest.approx(values(alone), rel=1e-5)
    for one, other in zip(together.examples(), alone.examples(), strict=True):
        assert one.id == other.id and one.loss == pytest.approx(other.loss, rel=1e-5)
    assert together.counts == alone.counts and together.data == alone.data
    assert together.run["processes"] == 2 and done.stdout.count("kept in") == 1


def loss_by_hugging_face(model: Any, ids: Sequence[int], *, context: int, stride: int) -> float:
    """The loop of the guide "Perplexity of fixed-length models", with labels of -100 for what is context alone; the last window
    is moved back, so that it is as long as the others.
    """
    longest, before, summed = context + 1, 0, 0.0
    for begin in range(0, len(ids), stride):
        end = min(begin + longest, len(ids))
        input_ids = torch.tensor([ids[max(0, end - longest) : end]])
        labels = input_ids.clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            mean = model(input_ids, labels=labels).loss
        summed += mean.item() * int((labels[:, 1:] != -100).sum())
        before = end
        if end == len(ids):
            break
    return summed


@pytest.mark.parametrize("stride", [SEQUENCE, 8])
def test_the_perplexity_is_that_of_transformers(
    run_dir: Path, exported: Path, corpus: Path, tmp_path: Path, stride: int
) -> None:
    found = evaluated(tmp_path / "out", f"checkpoint={run_dir}", f"task.stride={stride}", "limit=12")
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    documents = {name: tokens.tolist() for name, tokens in islice(Corpus(corpus, "validation").documents(), 12)}
    longest = max(map(len, documents.values()))
    assert min(map(len, documents.values())) < SEQUENCE < 3 * SEQUENCE < longest
    losses = {
        name: loss_by_hugging_face(model, ids, context=SEQUENCE, stride=stride)
        for name, ids in documents.items()
        if len(ids) > 1
    }
    examples = list(found.examples())
    by_document: dict[str, float] = {}
    for example in examples:  # of few documents blocks are kept
        name = example.id.rpartition("@")[0]
        by_document[name] = by_document.get(name, 0.0) + (example.loss or 0.0)
    assert by_document == pytest.approx(losses, rel=1e-4)
    targets = sum(len(ids) - 1 for ids in documents.values())
    assert sum(example.target_tokens for example in examples) == targets == found.counts["targets"]
    mean = sum(losses.values()) / targets
    assert values(found)["loss"] == pytest.approx(mean, rel=1e-4)
    assert values(found)["perplexity"] == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text_bytes = sum(len(tokenizer.decode(ids[1:-1]).encode()) for ids in documents.values())  # the end mark has none
    first_cut = sum("\ufffd" in tokenizer.decode(ids[1:]) for ids in documents.values())
    assert first_cut or values(found)["bits_per_byte"] == pytest.approx(sum(losses.values()) / 0.693147 / text_bytes, rel=1e-3)


def test_a_hugging_face_folder_and_its_checkpoint(exported: Path, corpus: Path, alone: Evaluation, tmp_path: Path) -> None:
    words = [f"hf={exported}", f"task.data=[{{path: {corpus}}}]", f"task.context={SEQUENCE}"]
    found = evaluated(tmp_path / "out", *words)
    assert values(found) == pytest.approx(values(alone), rel=1e-6)
    assert found.data == alone.data and found.model["tokenizer"] == alone.model["tokenizer"]
    assert found.model["hash"] != alone.model["hash"] and "step" not in found.model


def test_an_imported_checkpoint(exported: Path, corpus: Path, alone: Evaluation, tmp_path: Path, capsys: Any) -> None:
    imported = tmp_path / "imported"
    assert main(["import", f"hf={exported}", f"out={imported}", "proof=false"]) == 0
    assert main(["evaluate", f"checkpoint={imported}", *PLAIN]) == 93
    assert "a model from elsewhere has no held-out text of its own; give task.data" in capsys.readouterr().err
    words = [f"checkpoint={imported}", f"task.data=[{{path: {corpus}}}]", f"task.context={SEQUENCE}"]
    assert main(["evaluate", *words, *PLAIN]) == 0
    (found,) = find_evaluations(imported)
    assert values(found) == pytest.approx(values(alone), rel=1e-6)
    assert main(["evaluate", f"hf={exported}", *PLAIN, f"out={tmp_path / 'none'}"]) == 93
    assert "task.data" in capsys.readouterr().err and not (tmp_path / "none").exists()


# --- rows

SENTENCES = ("kaloter mi", "thing 42 an", "ro", "qu" * 60)
TRUTHS = ("ka", "th", "ka", "ka")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "dev.tsv"
    lines = [f"{text}\t{truth}\n" for text, truth in zip(SENTENCES, TRUTHS, strict=True)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def words_of(kind: str, rows: Path, *more: str) -> list[str]:
    return [f"task={kind}", f"task.data=[{{path: {rows}}}]", "task.columns=[text,label]", "task.target=label", *more]


def rescored(evaluation: Evaluation, examples: Sequence[Example]) -> dict[str, Any]:
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in evaluation.config["scores"].items()}
    how = {name: evaluation.config[name] for name in ("resamples", "confidence", "seed")}
    whole = tallies(evaluation.kind, examples, ScoreSettings(**given))[""]
    return measure(whole, **how)


def test_labels_are_those_of_a_hand_computation(run_dir: Path, exported: Path, rows: Path, tmp_path: Path) -> None:
    labels = {"ka": " kaloter", "th": " thing an"}
    more = ["task.prompt={text} =", "task.labels=[ka,th]", "task.label_texts=[kaloter,'thing an']"]
    found = evaluated(tmp_path / "out", f"checkpoint={run_dir}", *words_of("classification", rows, *more))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported).eval(), AutoTokenizer.from_pretrained(exported)
    examples = list(found.examples())
    for example, text, truth in zip(examples, SENTENCES, TRUTHS, strict=True):
        losses = {}
        for label, written in labels.items():
            prompt, whole = tokenizer(f"{text} =").input_ids, tokenizer(f"{text} ={written}").input_ids
            assert whole[: len(prompt)] == prompt
            with torch.no_grad():
                log_probabilities = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            losses[label] = -sum(log_probabilities[place - 1, whole[place]].item() for place in range(len(prompt), len(whole)))
        expected = torch.softmax(-torch.tensor(list(losses.values())), dim=0).tolist()
        assert list((example.probabilities or {}).values()) == pytest.approx(expected, rel=1e-4)
        assert example.output == min(losses, key=losses.get) and example.loss == pytest.approx(losses[truth], rel=1e-5)
        assert (example.id, example.truths) == (f"dev.tsv:{examples.index(example) + 1}", (truth,))
        assert example.input == f"{text} =" and example.scores["correct"] == float(example.output == truth)
    right = sum(example.output == example.truths[0] for example in examples)
    assert values(found)["accuracy"] == right / 4 and found.counts == {"examples": 4, "cut_off": 0}
    assert rescored(found, examples) == found.scores, "every figure can be had again from the examples"


def test_outputs_are_those_of_transformers(run_dir: Path, exported: Path, rows: Path, tmp_path: Path) -> None:
    more = ["task.prompt={text}", "task.stop=[never]", "task.max_new_tokens=12"]
    found = evaluated(tmp_path / "out", f"checkpoint={run_dir}", *words_of("translation", rows, *more))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported).eval(), AutoTokenizer.from_pretrained(exported)
    examples = list(found.examples())
    for example, text in zip(examples, SENTENCES, strict=True):
        prompt = tokenizer(text, return_tensors="pt")
        made = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, prompt.input_ids.shape[1] :]
        assert example.output == tokenizer.decode(made, skip_special_tokens=True).strip()
        assert example.output_tokens == len(made) and example.input_tokens == prompt.input_ids.shape[1]
    written = {field.name for field in fields(Example)} - {"probabilities"}  # a language model that writes has none
    lines = (found.folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    assert set().union(*(json.loads(line) for line in lines)) == written
    assert rescored(found, examples) == found.scores and "nrefs" in found.signatures["bleu"]


# --- what is kept


def test_all_that_repeats_it_is_kept(run_dir: Path, alone: Evaluation, corpus: Path) -> None:
    assert len(alone.model["hash"]) == 64 and alone.model["run"] == "first" and alone.model["step"] == 4
    assert alone.model["path"].endswith("checkpoints/step-00000004") and alone.model["parameters"] > 1000
    (data,) = alone.data
    assert data["path"] == str(corpus) and len(data["hash"]) == 64 and data["examples"] == alone.counts["examples"]
    assert alone.config["task"]["context"] == SEQUENCE and alone.config["task"]["stride"] == SEQUENCE // 2
    assert set(leaf_names(EvaluationConfig)) <= set(_leaves(alone.config))
    assert {"torch", "transformers", "tokenizers"} <= alone.run["versions"].keys()
    assert alone.run["git_commit"] and alone.run["seconds"] > 0 and "wandb_id" not in alone.run
    assert rescored(alone, list(alone.examples())) == alone.scores


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    nested = [(f"{prefix}{name}", value) for name, value in tree.items()]
    return [
        leaf for name, value in nested for leaf in (_leaves(value, f"{name}.") if isinstance(value, dict) and value else [name])
    ]


def test_a_second_one_stands_beside_the_first(run_dir: Path, capsys: Any) -> None:
    words = ["evaluate", f"checkpoint={run_dir}", *PLAIN]
    for limit, name in ((2, "step-00000004-language"), (2, "step-00000004-language-2"), (3, "step-00000004-language-3")):
        assert main([*words, f"limit={limit}"]) == 0
        shown = capsys.readouterr()
        assert shown.out.endswith(f"kept in          {run_dir / 'evaluations' / name}\n")
        assert "perplexity" in shown.out and "targets of out, context 32, stride 16" in shown.err
    first, second, third = find_evaluations(run_dir)
    assert values(first) == values(second) and first.data_hash == second.data_hash != third.data_hash
    assert first.data_hash.endswith(":2") and third.data_hash.endswith(":3")
    before = (first.folder / "evaluation.json").read_bytes()
    assert main([*words, f"out={first.folder}"]) == 93
    assert "an evaluation never replaces another" in capsys.readouterr().err
    assert (first.folder / "evaluation.json").read_bytes() == before


def test_figures_outlive_a_full_disk_and_files_a_stop(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stopped(*_: object) -> None:
        raise Stopped("SIGTERM")

    def full(*_: object, **__: object) -> None:
        raise UserError("out: cannot be written (No space left on device); nothing was kept")

    monkeypatch.setattr("train.stages.evaluate.send_to_wandb", stopped)
    evaluated(tmp_path / "out", f"checkpoint={run_dir}", "limit=1")
    assert "W&B: not told of it, as SIGTERM asked for a stop" in capsys.readouterr().err
    monkeypatch.setattr("train.stages.evaluate.publish", full)
    assert main(["evaluate", f"checkpoint={run_dir}", "limit=1", f"out={tmp_path / 'other'}", *PLAIN]) == 93
    shown = capsys.readouterr()
    assert "perplexity" in shown.out and "kept in" not in shown.out and "nothing was kept" in shown.err


def test_weights_and_biases_without_a_network(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = longhaul("evaluate", f"checkpoint={run_dir}", "limit=1", f"out={out}", "wandb.mode=offline", "device=cpu")
    assert done.returncode == 0 and "W&B: offline" in done.stderr, done.stderr
    assert list(out.glob("wandb/offline-run-*/*.wandb")) and read_evaluation(out).run["wandb_id"]


def test_a_stop_in_the_middle_keeps_nothing(run_dir: Path, tmp_path: Path) -> None:
    words = [f"checkpoint={run_dir}", "task.split=train", "task.stride=1", "processes=2", f"out={tmp_path / 'out'}", *PLAIN]
    with subprocess.Popen(command("evaluate", *words), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert "targets of" in process.stderr.readline()
        while not (companions := _children(process.pid)):
            time.sleep(0.05)
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 85, said
    assert "stopped by SIGTERM; nothing was kept" in said and "Traceback" not in said
    assert not list(tmp_path.iterdir()) and not [pid for pid in companions if Path(f"/proc/{pid}").exists()]


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


# --- what is refused

REFUSALS = [
    (["checkpoint=nowhere"], "checkpoint=nowhere: no such folder"),
    (["limit=0", "resamples=-1"], "the configuration has 2 problems"),
    (["task=nothing"], "task=nothing: no such option"),
    (["task.data=[{path: gone.txt}]"], "task.data: gone.txt: no such corpus, file, folder or pattern"),
    (["task=classification", "task.prompt=x"], "names no column"),
    (["task=translation", "task.data=[{path: gone.tsv}]"], "gone.tsv: cannot be read"),
]
LATER = [
    (["tensor=3", "processes=3"], "tensor=3: must divide the checkpoint's kv_heads, 2"),
    (["task.context=4097"], "task.context=4097: the model reads at most"),
    (["task.stride=33"], "task.stride=33: must not exceed the context of 32"),
    (["task=translation", "task.data=[{path: ROWS}]", "task.columns=[text,target]", "task.max_new_tokens=5000"], "no room for"),
    (["checkpoint=null", "hf=RUN"], "config.json"),
]


def test_what_is_wrong_is_told_before_torch_is_imported(run_dir: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from tools.cli import main
for words in {[words for words, _ in REFUSALS]!r}:
    code = main(["evaluate", "checkpoint={run_dir}", *words])
    assert code == 93 and "torch" not in sys.modules, (code, words)
    print("-----", file=sys.stderr)
"""
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=scaled(60), check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for said, (_, expected) in zip(done.stderr.split("-----\n"), REFUSALS, strict=False):
        assert said.count("longhaul evaluate:") == 1 and expected in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "expected"), LATER, ids=[words[-1] for words, _ in LATER])
def test_what_only_the_model_can_tell(run_dir: Path, rows: Path, capsys: Any, words: list[str], expected: str) -> None:
    before = sorted(run_dir.rglob("*"))
    given = [word.replace("ROWS", str(rows)).replace("RUN", str(run_dir)) for word in words]
    assert main(["evaluate", f"checkpoint={run_dir}", *PLAIN, *given]) == 93
    said = capsys.readouterr().err
    assert expected in said and said.count("longhaul evaluate:") == 1 and "Traceback" not in said
    assert sorted(run_dir.rglob("*")) == before


def test_the_help_has_every_field_within_a_second(capsys: Any) -> None:
    started = time.process_time()
    main(["evaluate", "--help"])
    assert time.process_time() - started < 1.0
    shown = capsys.readouterr().out
    assert not [name for name in leaf_names(EvaluationConfig) if f"  {name}  " not in shown]
    assert (
        "task.data[].targets" in shown and os.linesep.join(["examples:", "  longhaul evaluate checkpoint=runs/first"]) in shown
    )
