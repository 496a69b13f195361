"""A Slurm that only takes notes, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

SBATCH = """#!/bin/bash
echo "sbatch $*" >> {notes}
refused=$(cat {folder}/refuse 2> /dev/null || echo nothing)
grep -q -- "$refused" <<< "$*" && {{ echo "sbatch: error: Invalid account" >&2; exit 1; }}
count=$(cat {folder}/count 2> /dev/null || echo 100); echo $((count + 1)) > {folder}/count; echo "$count"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, as programs that note their words in the file that is returned."""
    folder = tmp_path / "bin"
    folder.mkdir()
    notes = tmp_path / "notes"
    notes.touch()
    (folder / "sbatch").write_text(SBATCH.format(notes=notes, folder=folder))
    (folder / "squeue").write_text(f"#!/bin/bash\ncat {folder}/queue 2> /dev/null\nexit 0\n")
    (folder / "scancel").write_text(f'#!/bin/bash\necho "scancel $*" >> {notes}\n')
    (folder / "scontrol").write_text(f'#!/bin/bash\n[ -e {folder}/ended ] && echo "JobId=$4 JobState=$(cat {folder}/ended)"\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return notes
