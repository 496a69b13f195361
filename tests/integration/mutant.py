"""`longhaul pretrain` with the mistake LONGHAUL_MISTAKE in its ranks: `python -m tests.integration.mutant WORDS`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.integration import faults
from tools.fault_injection import Faults, inject
from tools.faulty_run import FAULTS_FILE, MARKS_FOLDER

MODULE = "tests.integration.mutant"


def main(arguments: list[str]) -> int:
    if arguments[:1] != ["--rank"]:
        from train.launch import pretrain

        return pretrain(arguments, rank_command=(sys.executable, "-P", "-m", MODULE, "--rank"))
    from train import rank

    getattr(faults, os.environ["LONGHAUL_MISTAKE"])()
    run_dir = Path(arguments[1])
    if (run_dir / FAULTS_FILE).exists():
        inject(Faults.read(run_dir / FAULTS_FILE), run_dir / MARKS_FOLDER)
    rank.leave(rank.main(arguments[1:]))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
