"""`longhaul submit evaluate`: its words checked, its resources, and what is not there yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.errors import UserError
from slurm.submit import submit
from tests.unit.convert.checkpoints import LLAMA, write_checkpoint
from tests.unit.slurm.test_submit import words


@pytest.fixture
def checkpoint(slurm: Path, tmp_path: Path) -> str:
    """The folder of a run with a checkpoint, below the working directory."""
    write_checkpoint(tmp_path / "models/first", LLAMA)
    return "models/first"


def test_an_evaluation_has_the_gpus_and_cores_of_its_ranks(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "a b.tsv").write_text("text\tlabel\nx\tyes\n")
    row = [
        "task.data=[{path: 'a b.tsv'}]",
        "task.prompt=Is {text}, \\n or not?",
        "task.target=label",
        "task.labels=['yes','no']",
    ]
    words = ["evaluate", f"checkpoint={checkpoint}", "task=classification", *row, "processes=4"]
    submit([*words, "cluster=slurm_gpu", "cluster.gpu_bind=closest"])
    root = Path("runs/evaluate-first-classification")
    script = (root / "slurm/evaluate.sbatch").read_text()
    assert "#SBATCH --gpus-per-node=4\n" in script and "#SBATCH --ntasks-per-node=1\n" in script
    assert "#SBATCH --cpus-per-task=32\n" in script and "--cpus-per-task=32 " in script and "--gpu-bind" not in script
    assert "processes=4" in script and "'task.prompt=Is {text}, \\n or not?'" in script
    assert "yes" in (root / "slurm/evaluate.yaml").read_text()
    submit(["evaluate", f"checkpoint={checkpoint}", "cluster=slurm_gpu", "name=alone", "task.data=[{path: 'a b.tsv'}]"])
    assert "--gpus-per-node=1\n" in Path("runs/alone/slurm/evaluate.sbatch").read_text()
    for more in (["cluster=slurm_gpu", "device=cpu"], ["cluster=slurm_cpu"]):
        submit(["evaluate", f"checkpoint={checkpoint}", "processes=2", *more, f"name={more[0][-3:]}"])
        assert "gpus-per-node" not in Path(f"runs/{more[0][-3:]}/slurm/evaluate.sbatch").read_text()


def test_a_job_that_needs_no_gpu_gets_none(slurm: Path) -> None:
    submit(["import", "hf=models/it", "out=imported/it", "cluster=slurm_gpu"])
    assert "--gpus-per-node" not in Path("runs/import-it/slurm/import.sbatch").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["checkpoint=nowhere"], "checkpoint=nowhere: no such folder"),
        (["task.stride=0"], "task.stride=0: the window must move"),
        (["task.data=[{path: gone.txt}]"], "task.data: gone.txt: no such corpus"),
        (["task=translation", "task.data=[{path: gone.tsv}]"], "gone.tsv: cannot be read"),
        (
            ["processes=16", "cluster=slurm_gpu"],
            "processes=16: a rank needs a GPU of its own, and a node has cluster.gpus_per_node=8",
        ),
        (["device=cuda"], "device=cuda: cluster.gpus_per_node=0"),
        (["nodes=2"], "nodes=2: evaluate is one process"),
        (["parts=2"], "parts=2: only prepare is done in parts"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_an_evaluation_that_does_not_fit(checkpoint: str, slurm: Path, more: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        submit(["evaluate", f"checkpoint={checkpoint}", "cluster=slurm_cpu", *more])
    assert said in str(caught.value)
    assert not Path("runs").exists() and slurm.read_text() == ""


def test_an_evaluation_of_what_is_not_there_yet(corpus: Path, slurm: Path, tmp_path: Path) -> None:
    submit(words(corpus))
    (tmp_path / "bin/queue").write_text("100|PENDING|Priority||N/A\n")
    later = ["evaluate", "checkpoint=runs/first", "after=[first]", "cluster=slurm_cpu"]
    submit([*later, "task.data=[{path: data/later}]"])
    assert "--dependency=afterok:100" in slurm.read_text()
    with pytest.raises(UserError, match="tokenize"):
        submit([*later, "task=translation", "task.data=[{path: later.tsv}]", "task.tokenize=nothing", "name=other"])
