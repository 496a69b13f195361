"""What the other verbs make of a fine-tuning run's folder: its page, its steps, a comparison, its adapters for PEFT."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conf.errors import ConfigError, UserError
from tests.dist import run_ranks
from tests.integration import finetuning
from tools.compare.verb import compare
from tools.inspect_step import InspectConfig
from tools.inspect_step import run as inspect
from tools.report import ReportConfig
from tools.report import run as report
from train.checkpoint.manifest import resolve_checkpoint
from train.config.adapter import LoraConfig
from train.config.export import ExportConfig
from train.config.generate import GenerateConfig
from train.config.method import MethodConfig
from train.config.training import OptimConfig
from train.convert.peft_export import WEIGHTS, write_adapter
from train.launch import prepare_folder
from train.stages.export import run as export
from train.stages.generate import run as generate

pytestmark = pytest.mark.further

STEPS = 60
PROMPT = "owl cat saw >"


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetuning.base(tmp_path_factory.mktemp("base"), corpus)


def finished(run_dir: Path, config) -> Path:
    """A run as `longhaul finetune` leaves it."""
    config = finetuning.ready(config, run_dir)
    prepare_folder(run_dir, replace(config, launch=replace(config.launch, processes=1)))
    assert run_ranks(finetuning.attempt, 1, config, str(run_dir), 1) == [("finished", config.budget.steps)]
    return run_dir


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With adapters; it writes the last word of a row again."""
    folder = tmp_path_factory.mktemp("tuned")
    method = MethodConfig(lora=LoraConfig(rank=8, alpha=16))
    more = {"method": method, "optim": OptimConfig(lr=2e-2, weight_decay=0.0), "steps": STEPS}
    rows = finetuning.written_file(folder, rows=300)
    return finished(folder / "lora", finetuning.settings(base, rows, kind="generation", **more))


@pytest.fixture(scope="module")
def labelled(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, for labels."""
    folder = tmp_path_factory.mktemp("labelled")
    return finished(folder / "labels", finetuning.settings(base, finetuning.labelled_file(folder), steps=6))


def test_its_page_has_figures_outputs_and_rows(tuned: Path, tmp_path: Path) -> None:
    assert report(ReportConfig(run=str(tuned), out=str(tmp_path / "page"))) == 0
    text = (tmp_path / "page/index.html").read_text()
    assert (tmp_path / "page/task.png").exists() and "held-out rows" in text
    outputs = [json.loads(line) for line in (tuned / f"outputs/step-{STEPS:08d}.jsonl").read_text().splitlines()]
    assert outputs and all(output["id"] in text for output in outputs)
    assert f"Step {STEPS}." in text and "rougeL" in text and "rouge1_precision" not in text.split("<h2>Outputs")[1]
    assert "rows of prompt and completion" in text and "of which learned" in text


def test_the_page_of_labels(labelled: Path, tmp_path: Path) -> None:
    assert report(ReportConfig(run=str(labelled), out=str(tmp_path / "page"))) == 0
    text = (tmp_path / "page/index.html").read_text()
    assert "accuracy" in text and "correct" in text.split("<h2>Outputs")[1]


def test_a_page_of_what_is_damaged_or_gone(tuned: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tuned, broken, ignore=shutil.ignore_patterns("checkpoints", "rows", "base"))
    with (broken / f"outputs/step-{STEPS:08d}.jsonl").open("a") as file:
        file.write('{"id": 3}\n')
    report(ReportConfig(run=str(broken)))
    text = (broken / "report/index.html").read_text()
    assert "1 lines of" in text and "holds no rows.json" in text
    shutil.rmtree(broken / "outputs")
    report(ReportConfig(run=str(broken)))
    assert "No evaluation has written any" in (broken / "report/index.html").read_text()


def test_a_step_shows_its_rows(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(InspectConfig(run=str(tuned), step=3, limit=1)) == 0
    shown = capsys.readouterr().out
    assert "written-0.jsonl:" in shown and "is what the step read" in shown and ">" in shown


def test_runs_of_different_tasks_are_compared(tuned: Path, labelled: Path, tmp_path: Path, capsys) -> None:
    assert compare([f"run={labelled}", f"run={tuned}", f"out={tmp_path / 'page'}"]) == 0
    shown = capsys.readouterr().out
    assert "data          task.kind" in " ".join(shown.split("\n")) and "data fingerprint" in shown
    assert f"longhaul evaluate checkpoint={labelled}\n" in shown
    assert "the same: tokenizer" in shown and "their held-out losses are not of the same text" in " ".join(shown.split())


def greedy(model, tokenizer) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    made = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=0, pad_token_id=0)[0]
    return tokenizer.decode(made[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_adapters_are_read_by_peft(base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the exported base, merged in an export, and in our own hands: the same logits, the same text."""
    theirs, merged, adapter = tmp_path / "base", tmp_path / "merged", tmp_path / "adapter"
    export(ExportConfig(checkpoint=str(base), out=str(theirs), proof=False))
    export(ExportConfig(checkpoint=str(tuned), out=str(merged), proof=False))
    export(ExportConfig(checkpoint=str(tuned), out=str(adapter), adapter=True, base_model=str(theirs)))
    auto = transformers.AutoModelForCausalLM
    beside = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(theirs)
    whole, bare = auto.from_pretrained(merged), auto.from_pretrained(theirs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    inputs = tokenizer("dog axe peg >axe", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (beside, whole, bare)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 0.1, "the adapters do nothing"
    capsys.readouterr()
    settings = {"max_new_tokens": 8, "temperature": 0.0, "dtype": "fp32", "stream": False}
    generate(GenerateConfig(checkpoint=str(tuned), prompt=PROMPT, **settings))
    ours = capsys.readouterr().out
    texts = [greedy(model, tokenizer) for model in (beside, whole)]
    assert texts[0] == texts[1] and texts[0].strip()
    assert ours.strip() == texts[0].strip()
    report = json.loads((adapter / "conversion_report.json").read_text())
    assert report["proved"] and report["format"] == "adapter" and "peft" in report["versions"]
    assert report["proof"]["logits"]["argmax_equal"] >= 1000 and report["proof"]["generation"]["passed"]
    card = (adapter / "README.md").read_text()
    assert f"PEFT {peft.__version__}, beside the base, and compared in fp32" in card
    assert "library_name: peft" in card and f"base_model: {theirs}" in card and "rank 8, alpha 16" in card


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda name, tensor: tensor * (1.02 if name.endswith("0.self_attn.o_proj.lora_B.weight") else 1.0),
            "logits: logits differ",
        ),
        (
            lambda name, tensor: None if name.endswith("0.self_attn.o_proj.lora_B.weight") else tensor,
            "weights: 1 tensors are not",
        ),
    ],
    ids=["other values", "one is missing"],
)
def test_other_adapters_are_not_published(tuned: Path, tmp_path: Path, monkeypatch, change, expected: str) -> None:
    def write_others(reader, folder: Path, *, base_model: str) -> None:
        write_adapter(reader, folder, base_model=base_model)
        changed = {name: change(name, tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, folder / WEIGHTS)

    monkeypatch.setattr("train.stages.export.write_adapter", write_others)
    with pytest.raises(UserError, match="nothing was published") as caught:
        export(ExportConfig(checkpoint=str(tuned), out=str(tmp_path / "adapter"), adapter=True, base_model="some/base"))
    assert expected in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_adapters_of_a_model_of_labels_are_proved(base: Path, tmp_path: Path) -> None:
    config = finetuning.settings(
        base, finetuning.labelled_file(tmp_path), steps=6, method=MethodConfig(lora=LoraConfig(rank=4))
    )
    run_dir = finished(tmp_path / "run", config)
    export(ExportConfig(checkpoint=str(run_dir), out=str(tmp_path / "adapter"), adapter=True, base_model="some/base"))
    report = json.loads((tmp_path / "adapter/conversion_report.json").read_text())
    assert report["proved"] and report["proof"]["rows"]["labels"] == 2


def test_without_peft_adapters_are_written_and_it_is_told(tuned: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("train.stages.export.has_peft", lambda: False)
    export(ExportConfig(checkpoint=str(tuned), out=str(tmp_path / "adapter"), adapter=True, base_model="some/base"))
    assert "not proved  peft is not installed" in capsys.readouterr().out
    report = json.loads((tmp_path / "adapter/conversion_report.json").read_text())
    assert not report["proved"] and report["not_proved"] == "peft is not installed"
    assert "There is none: peft is not installed." in (tmp_path / "adapter/README.md").read_text()


def test_adapters_that_cannot_be_written(tuned: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    with pytest.raises(UserError, match="has no adapters, its run trained the weights themselves; export the model instead"):
        export(ExportConfig(checkpoint=str(labelled), out=str(out), adapter=True, base_model="some/base"))
    with pytest.raises(UserError, match="base_model=null: .* is of no name on the hub; give base_model=NAME, or a folder"):
        export(ExportConfig(checkpoint=str(tuned), out=str(out), adapter=True))
    with pytest.raises(ConfigError, match="base_model=some/base: is of adapters; add adapter=true"):
        ExportConfig(checkpoint=str(tuned), base_model="some/base")
    with pytest.raises(ConfigError, match="base_model='': needs a name on the hub or a folder"):
        ExportConfig(checkpoint=str(tuned), adapter=True, base_model="")
    with pytest.raises(UserError, match="is what is read"):
        export(ExportConfig(checkpoint=str(tuned), out=str(resolve_checkpoint(str(tuned))), adapter=True, base_model="b"))
    assert not out.exists()
