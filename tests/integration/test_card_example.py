"""The code in a model card, as it is printed: it runs, and reads a text as training did."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from tests.command import run_module
from tests.integration import finetuning
from tests.integration.test_evaluate_finetuned import STEPS, TALKS, finished
from tests.unit.convert.checkpoints import rewritten
from train.checkpoint.manifest import file_facts, read_manifest
from train.config.adapter import LoraConfig
from train.config.export import ExportConfig
from train.config.finetune import FinetuneConfig
from train.config.method import MethodConfig
from train.stages.export import run as export

pytestmark = pytest.mark.further


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetuning.base(tmp_path_factory.mktemp("base"), corpus)


@pytest.fixture(scope="module")
def opened(base: Path) -> Path:
    """Its tokenizer opens every text by itself."""
    path = base / "tokenizer/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(path))
    files = {name: vars(file) for name, file in read_manifest(base).files.items()}
    rewritten(base, files=files | {"tokenizer/tokenizer.json": vars(file_facts(path))})
    return base


def example(card: Path, more: str = "") -> str:
    """What the card's code prints, and `more` behind it."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", card.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert 'folder = "path/to/this/folder"' in code
    folder = card.parent.parent / "example"
    folder.mkdir()
    (folder / "cards_example.py").write_text(code.replace("path/to/this/folder", str(card.parent)) + more, encoding="utf-8")
    done = run_module("cards_example", environment={"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def exported(run_dir: Path, out: Path, **words: object) -> Path:
    export(ExportConfig(checkpoint=str(run_dir), out=str(out), proof=False, **words))
    return out / "README.md"


IDS = "\nprint(inputs['input_ids'][0].tolist())"


def config_of(kind: str, base: Path, folder: Path, *, opening: bool) -> FinetuneConfig:
    rows = folder / "chats.jsonl"
    rows.write_text("".join(f"{json.dumps(talk)}\n" for talk in TALKS))
    made = {"classification": finetuning.labelled_file, "generation": finetuning.written_file}
    config = finetuning.settings(base, made[kind](folder) if kind in made else rows, kind=kind, steps=STEPS)
    data = replace(config.data, sequence_length=64, template="plain" if kind == "dialogue" else None)
    return replace(config, opening=opening, data=data)


@pytest.mark.parametrize("opening", [False, True], ids=["bare", "opened"])
@pytest.mark.parametrize("kind", ["classification", "generation", "dialogue"])
def test_the_example_of_a_model(opened: Path, tmp_path: Path, kind: str, opening: bool) -> None:
    run_dir = finished(tmp_path / "run", config_of(kind, opened, tmp_path, opening=opening))
    *printed, ids = example(exported(run_dir, tmp_path / "hf"), IDS).strip().splitlines()
    assert printed and (kind != "classification" or printed in (["animal"], ["tool"]))
    assert (json.loads(ids)[0] == 0) == opening and json.loads(ids)[1] != 0


@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_the_example_of_adapters(opened: Path, tmp_path: Path, kind: str) -> None:
    config = replace(config_of(kind, opened, tmp_path, opening=True), method=MethodConfig(lora=LoraConfig(rank=4)))
    run_dir = finished(tmp_path / "run", config)
    exported(opened, tmp_path / "base")
    card = exported(run_dir, tmp_path / "adapter", adapter=True, base_model=str(tmp_path / "base"))
    *printed, ids = example(card, IDS).strip().splitlines()
    assert printed and (kind != "classification" or printed in (["animal"], ["tool"])) and json.loads(ids)[0] == 0
