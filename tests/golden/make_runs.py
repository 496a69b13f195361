"""Makes the recorded runs of this folder: `python -m tests.golden.make_runs`, by hand, once, on commit 417006b; no test does.

The corpora and rows are written to tests/golden/data, the folders of the runs to tests/golden/runs. Each run is stopped by
`budget.stop_at_step` five steps before its end; a copy of it then runs to the end, which gives `expected.json`. A run that
has one is left as it is, so the command may be started again. All paths are relative to tests/golden, where the program is
started, so that the folder can be copied anywhere.

The program is used by its command line alone. The words of a run are kept in its `words.txt`: they name every setting that the
numbers follow from and that a later version may give another default.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
STOP, STEPS = 7, 12
STOPPED, FINISHED = 85, 0

SYLLABLES = ("ka", "lo", "mi", "ter", "an", "\u00e9s", "qu", "ro", "ze", "th", "\u4e16", "ing", "7", "42")
ANIMALS, TOOLS = ("cat", "dog", "owl", "fox"), ("saw", "axe", "peg", "awl")

GPT2 = ("model=gpt2_tiny", "model.num_heads=2", "model.ffn_size=64")
LLAMA = ("model=llama_tiny", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_size=48", "model.tied_head=false")
COMMON = (
    "run.folder=runs", "run.seed=11", "launch.device=cpu", "monitor=quiet", "precision=fp32",
    f"budget.steps={STEPS}", "batch.sequences=8", "batch.micro_batch=2",
    "checkpoint.every_steps=null", "checkpoint.keep_last=1", "evaluate.probes=[]",
    "optim.beta1=0.85", "optim.beta2=0.97", "optim.epsilon=1.0e-5", "optim.weight_decay=0.1", "optim.grad_clip=1.0",
    "schedule.warmup_fraction=null", "schedule.warmup_steps=3", "schedule.min_ratio=0.1",
)  # fmt: skip
PRETRAIN = (
    "pretrain", "model.num_layers=2", "model.hidden_size=32", "model.max_positions=64", "model.dropout=0.1",
    # The second corpus is so small that it is read more than once: the order within an epoch counts too.
    "data.sources=[{path: data/english, weight: 3}, {path: data/other, weight: 1}]",
    "data.sequence_length=32", "data.max_epochs=8", "optim.lr=0.003", "evaluate.every_steps=5",
    "evaluate.max_samples=8",
)  # fmt: skip
FINETUNE = (
    "finetune", "data.sequence_length=32", "data.validation_fraction=0.2",
    # The best checkpoint is the last one, so that one is all that the run holds.
    f"evaluate.every_steps={STOP}", "checkpoint.keep_best=1",
)  # fmt: skip
# The model of a comparison of answers has the dropout of `preference`, that of the others the dropout of `model`.
GENERATION = (*FINETUNE, "task=generation", "task.data=[{path: data/written.jsonl}]", "model.dropout=0.1", "scoring.max_rows=2")
LORA = ("method=lora", "method.lora.rank=4", "method.lora.alpha=8", "method.lora.dropout=0.1", "optim.lr=0.03")
LABELS = (*FINETUNE, "task=classification", "task.data=[{path: data/labelled.jsonl}]", "model.dropout=0.1", "optim.lr=0.003")
PAIRS = (*FINETUNE, "task=preference", "task.data=[{path: data/pairs.jsonl}]", "preference.dropout=0.1", "optim.lr=0.002")
OF_GPT2, OF_LLAMA = "checkpoint=runs/pretrain-zero1-tensor1", "checkpoint=runs/pretrain-zero3-tensor2"


def layout(zero: int, tensor: int, processes: int = 2) -> tuple[str, ...]:
    return (f"parallel.zero={zero}", f"parallel.tensor={tensor}", f"launch.processes={processes}")


# Every pair of kind, ZeRO stage and tensor-parallel ranks occurs.
RUNS: dict[str, tuple[str, ...]] = {
    "pretrain-zero1-tensor1": (
        *PRETRAIN, *GPT2, *layout(1, 1), "schedule=cosine",
        "batch.ramp_start=4", "batch.ramp_increment=4", "batch.ramp_samples=32",
    ),
    "pretrain-zero3-tensor2": (
        *PRETRAIN, *LLAMA, *layout(3, 2, processes=4), "parallel.sequence_parallel=true",
        "schedule=wsd", "schedule.decay_fraction=0.5",
    ),
    "lora-zero1-tensor2": (*GENERATION, *LORA, OF_LLAMA, *layout(1, 2), "schedule=linear"),
    "lora-zero3-tensor1": (*GENERATION, *LORA, OF_GPT2, *layout(3, 1), "schedule=cosine", "method.neftune_alpha=5.0"),
    "classification-zero1-tensor2": (*LABELS, OF_GPT2, *layout(1, 2), "schedule=cosine"),
    "classification-zero3-tensor1": (*LABELS, OF_LLAMA, *layout(3, 1), "schedule=linear", "method.layer_decay=0.8"),
    "preference-zero1-tensor1": (*PAIRS, OF_LLAMA, *layout(1, 1, processes=1), "schedule=linear"),
    "preference-zero3-tensor2": (*PAIRS, OF_GPT2, *layout(3, 2), "schedule=inverse_sqrt"),
}  # fmt: skip


def longhaul(words: Sequence[str], *, folder: Path, code: int) -> None:
    """The command, started in `folder`; raises RuntimeError when it ends with another code than `code`."""
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1", "SLURMD_NODENAME": "localhost"}
    command = [sys.executable, "-P", "-m", "tools.cli", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(words)}\nended with {done.returncode}:\n{done.stdout}\n{done.stderr}")


def make_corpus(name: str, *, documents: int, seed: int, tokenizer: Sequence[str]) -> None:
    output = FOLDER / "data" / name
    if output.exists():
        return
    draw = random.Random(seed)
    texts = [" ".join(_word(draw) for _ in range(draw.randrange(1, 60))) for _ in range(documents)]
    source = FOLDER / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    words = ["corpus=jsonl", "corpus.paths=[texts.jsonl]", f"corpus.name={name}", f"output=data/{name}", *tokenizer]
    more = ["held_out_fraction=0.1", "shard_tokens=2048", "workers=1"]
    longhaul(["prepare", *words, *more], folder=FOLDER, code=FINISHED)
    source.unlink()


def _word(draw: random.Random) -> str:
    return "".join(draw.choice(SYLLABLES) for _ in range(draw.randrange(1, 4)))


def write_rows(name: str, rows: Sequence[dict[str, str]]) -> None:
    path = FOLDER / "data" / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def labelled(draw: random.Random) -> dict[str, str]:
    """A row of a few words, an animal or a tool among them, which is its label."""
    label, words = draw.choice((("animal", ANIMALS), ("tool", TOOLS)))
    others = [_word(draw) for _ in range(draw.randrange(0, 3))]
    place = draw.randrange(len(others) + 1)
    return {"text": " ".join([*others[:place], draw.choice(words), *others[place:]]), "label": label}


def written(draw: random.Random) -> dict[str, str]:
    """A row whose answer is its last word."""
    words = [draw.choice((*ANIMALS, *TOOLS)) for _ in range(draw.randrange(1, 5))]
    return {"prompt": " ".join(words) + " >", "completion": words[-1]}


def pair(draw: random.Random) -> dict[str, str]:
    """A pair whose shorter answer is preferred."""
    prompt, *words = [draw.choice((*ANIMALS, *TOOLS)) for _ in range(draw.randrange(3, 5))]
    return {"prompt": f"{prompt} >", "chosen": f" {words[0]}", "rejected": f" {' '.join(words)}"}


def make_run(name: str) -> None:
    """The run up to its stop, and what it does next."""
    run_dir = FOLDER / "runs" / name
    if (run_dir / "expected.json").exists():
        return
    verb, *own = RUNS[name]
    words = [*COMMON, *own, f"run.name={name}"]
    shutil.rmtree(run_dir, ignore_errors=True)
    longhaul([verb, *words, f"budget.stop_at_step={STOP}"], folder=FOLDER, code=STOPPED)
    shutil.rmtree(run_dir / "logs")  # of this machine: nothing in them is read by a resume
    rows = run_dir / "rows" / "rows.json"
    if rows.exists():  # so is the place of the tokenizer that encoded the rows; the run has one of its own
        rows.write_text(rows.read_text(encoding="utf-8").replace(str(FOLDER), "/golden"), encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        for part in ("data", f"runs/{name}"):
            shutil.copytree(FOLDER / part, Path(place) / part, symlinks=True)  # `best` is a link
        longhaul([verb, *words], folder=Path(place), code=FINISHED)
        lines = (Path(place) / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["step"] > STOP]
    expected = {
        "commit": json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["git_commit"],
        "train": [
            {key: record[key] for key in ("step", "lr", "loss", "grad_norm")} for record in records if record["kind"] == "train"
        ],
        "evaluation": [{key: record[key] for key in ("step", "loss")} for record in records if record["kind"] == "evaluation"],
    }
    (run_dir / "words.txt").write_text("".join(f"{word}\n" for word in (verb, *words)), encoding="utf-8")
    (run_dir / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: losses {[record['loss'] for record in expected['train']]}", flush=True)


def main() -> None:
    (FOLDER / "data").mkdir(exist_ok=True)
    bpe = ("tokenizer=bpe", "tokenizer.vocab_size=300", "tokenizer.engine=hf")
    make_corpus("english", documents=150, seed=1, tokenizer=bpe)
    same = ("tokenizer=hf", "tokenizer.path=data/english/tokenizer", "tokenizer.engine=hf")
    make_corpus("other", documents=24, seed=2, tokenizer=same)
    for number, (name, make) in enumerate((("labelled", labelled), ("written", written), ("pairs", pair))):
        draw = random.Random(number)
        write_rows(name, [make(draw) for _ in range(160)])
    for name in RUNS:
        make_run(name)


if __name__ == "__main__":
    main()
