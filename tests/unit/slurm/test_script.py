"""The rendered scripts: golden files of three sites, shellcheck, quoting."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conf.compose import compose, validate
from conf.errors import UserError
from slurm.config import ClusterConfig, SubmitConfig
from slurm.script import TASK, UNIT, Job, render

GOLDEN = Path(__file__).parents[2] / "golden" / "slurm"
RUN = Job(
    stage="pretrain",
    name="first",
    root=Path("/work/runs/first"),
    directory=Path("/work"),
    units=("",),
    command=["-m", "train.rank", UNIT],
    local_command=["-m", "train.launch", UNIT],
    nodes=4,
    ranks_per_node=8,
    trains=True,
)
PART = replace(
    RUN,
    stage="read",
    units=tuple(f"read/{part:03d}" for part in range(12)),
    command=["-m", "tools.cli", "prepare", "corpus.name=it's mine", f"part={TASK}", "parts=12"],
    nodes=1,
    ranks_per_node=1,
    trains=False,
    throttle=3,
)
SITES = {
    "plain": (RUN, ["cluster=slurm_gpu", "cluster.account=abc", "cluster.partition=gpu", "cluster.modules=[cuda/12.8]"]),
    "container": (RUN, ["cluster=slurm_pyxis", "cluster.qos=normal", "cluster.container.mounts=[/data, '/home/me:/me']"]),
    "infiniband": (RUN, ["cluster=slurm_infiniband", "cluster.partition=short", "cluster.rendezvous_suffix=-ib0", "jobs=5"]),
    "array": (PART, ["cluster=slurm_cpu"]),
    "local": (replace(RUN, nodes=1), ["cluster=local"]),
    "apptainer": (
        RUN,
        ["cluster=slurm_gpu", "cluster.container.kind=apptainer", "cluster.container.image=/images/longhaul.sif"],
    ),
}
COMPARED = ("plain", "container", "infiniband")


def site(words: list[str]) -> ClusterConfig:
    return validate(SubmitConfig, compose("submit", words)).cluster


def script_of(name: str) -> str:
    job, words = SITES[name]
    return render(job, site(words)).replace(sys.executable, "/opt/venv/bin/python")


@pytest.mark.parametrize("name", COMPARED)
def test_the_script_is_the_golden_one(name: str) -> None:
    """Renewed on purpose only: python -m tests.unit.slurm.test_script."""
    assert script_of(name) == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("name", SITES)
def test_shellcheck_finds_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text(script_of(name))
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


ODD = ["two words", "it's", "größe-模型", "a;rm -rf b", "$(id)&|<>*?", "~", "#no", "!x", "TASK", "UNIT"]


@pytest.mark.parametrize("word", ODD)
def test_words_reach_the_program_as_they_are(word: str, tmp_path: Path) -> None:
    """The script is run by a real shell, with programs that only tell what they were given."""
    root = tmp_path / "runs" / ("plain" if "$" in word else word)
    (root / "slurm").mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\ncase "$*" in *begin*) echo 1; mkdir -p "$5/logs/attempt-01";; '
        f'*lifecycle*) echo exit 0;; *) printf "%s\\n" "$@" > {tmp_path}/given;; esac\n'
    )
    python.chmod(0o755)
    cluster = replace(site(["cluster=local"]), setup=())
    command = ["-m", "tools.cli", "export", f"out={word}"]
    job = replace(PART, name="x", root=root, directory=tmp_path, units=("",), command=command, local_command=command)
    text = render(job, cluster).replace(sys.executable, str(python))
    path = tmp_path / "job.sh"
    path.write_text(text)
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "given").read_text().splitlines() == ["-P", "-m", "tools.cli", "export", f"out={word}"]


@pytest.mark.parametrize("letter", ['"', "\\", "%", "`", "$", "\n"])
def test_letters_that_slurm_cannot_hold_are_refused(letter: str) -> None:
    with pytest.raises(UserError, match="sbatch does not take"):
        render(replace(RUN, name=f"a{letter}b"), site(["cluster=slurm_cpu"]))
    with pytest.raises(UserError, match="sbatch does not take"):
        render(replace(RUN, root=Path(f"/a{letter}b/runs")), site(["cluster=slurm_cpu"]))


def renew() -> None:
    """Write the golden files anew."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in COMPARED:
        (GOLDEN / f"{name}.sbatch").write_text(script_of(name))


if __name__ == "__main__":
    renew()
