"""Which tests run when: the tiers that pyproject.toml, .ci/run and tools/campaign.sh choose by their marks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import timeouts
from tests.timeouts import scaled
from tests.unit.sources import REPOSITORY

MARKED = re.compile(r"""mark\.campaign\(name="(\w+)"\)""")


def listed() -> dict[str, int]:
    """Names of the campaigns and their minutes, as their script prints them."""
    done = subprocess.run(["bash", "tools/campaign.sh"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=2) for line in done.stdout.partition("what it holds\n")[2].splitlines()]
    assert all(len(row) == 3 for row in rows)
    return {name: int(minutes) for name, minutes, _ in rows}


def test_every_campaign_is_listed_and_holds_tests() -> None:
    files = [path for path in (REPOSITORY / "tests").rglob("test_*.py") if path != Path(__file__)]
    assert {name for path in files for name in MARKED.findall(path.read_text())} == set(listed())


def test_an_unknown_campaign_is_refused() -> None:
    done = subprocess.run(["bash", "tools/campaign.sh", "nothing"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "no campaign nothing; there are: faults layouts" in done.stderr


SUITE = """
import pytest
def test_usual(): pass
@pytest.mark.further
def test_further(): pass
@pytest.mark.campaign(name="one")
def test_one(): pass
@pytest.mark.campaign(name="other")
@pytest.mark.further
def test_other(): assert {fails} == 0
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A folder with our tiers and nothing else of ours."""
    settings = (REPOSITORY / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in settings
    (tmp_path / "pyproject.toml").write_text(settings.replace('testpaths = ["tests"]', 'testpaths = ["checks"]'))
    (tmp_path / "checks").mkdir()
    (tmp_path / "checks/conftest.py").write_text(
        "from tests.session import pytest_addoption, pytest_collection_modifyitems, pytest_configure\n"
    )
    (tmp_path / "checks/test_tiers.py").write_text(SUITE.format(fails=1))
    return tmp_path


def outcomes(folder: Path, *words: str) -> dict[str, str]:
    """Outcome of every test that ran."""
    command = [sys.executable, "-m", "pytest", "-rA", "--rootdir", str(folder), "--import-mode=importlib", *words]
    environment = {"PYTHONPATH": str(REPOSITORY), timeouts.VARIABLE: "1", "PATH": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=scaled(60))
    assert done.returncode == int("FAILED" in done.stdout), done.stdout
    return {name: outcome for outcome, name in re.findall(r"^(PASSED|FAILED) \S+::test_(\w+)", done.stdout, re.MULTILINE)}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"usual"}),
        (["-m", "not campaign"], {"usual", "further"}),
        (["-m", "campaign(name='one')"], {"one"}),
        (["-m", ""], {"usual", "further", "one", "other"}),
    ],
)
def test_tiers(suite: Path, words: list[str], expected: set[str]) -> None:
    assert set(outcomes(suite, *words)) == expected


def test_a_record_leaves_out_what_has_passed(suite: Path) -> None:
    # As one word: two, and pytest takes a record that exists for a place of tests, and looks for our options there.
    assert ' --record="' in (REPOSITORY / "tools/campaign.sh").read_text()
    words = ["-m", "campaign", "--record=.cache/campaigns/all.tsv"]
    assert outcomes(suite, *words) == {"one": "PASSED", "other": "FAILED"}
    assert outcomes(suite, *words) == {"other": "FAILED"}, "what failed is tried again"
    (suite / "checks/test_tiers.py").write_text(SUITE.format(fails=0))
    assert outcomes(suite, *words) == {"other": "PASSED"}
    assert outcomes(suite, *words) == {}, "and it ends well, though nothing is left to run"
    with (suite / ".cache/campaigns/all.tsv").open("a") as record:
        record.write("failed\t0.1\tchecks/test_tiers.py::test_one\n")  # as when it was torn down
    assert outcomes(suite, *words) == {"one": "PASSED"}
    lines = [line.split("\t") for line in (suite / ".cache/campaigns/all.tsv").read_text().splitlines()]
    assert [(line[0], line[2]) for line in lines][:4] == [
        ("passed", "checks/test_tiers.py::test_one"),
        ("failed", "checks/test_tiers.py::test_other"),
        ("failed", "checks/test_tiers.py::test_other"),
        ("passed", "checks/test_tiers.py::test_other"),
    ]


def test_limits_grow_with_the_time_that_things_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "REFERENCE_SECONDS", 1e-4)
    assert timeouts.measure(1) == timeouts.MOST
    monkeypatch.setattr(timeouts, "REFERENCE_SECONDS", 1e4)
    assert timeouts.measure(1) == 1.0, "never less than what was written"
    monkeypatch.setenv(timeouts.VARIABLE, "2.5")
    assert scaled(4) == 10.0
