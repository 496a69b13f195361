"""`longhaul pretrain` whose ranks meet the faults in the run's folder: `python -m tools.faulty_run WORDS`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

FAULTS_FILE, MARKS_FOLDER = "faults.json", "faults"
MODULE = "tools.faulty_run"


def main(arguments: Sequence[str]) -> int:
    """Launch the run, or be one of its ranks."""
    if arguments[:1] != ["--rank"]:
        from train.launch import pretrain

        config_dir = next((word.partition("=")[2] for word in arguments if word.startswith("--config-dir=")), None)
        words = [word for word in arguments if not word.startswith("--config-dir=")]
        return pretrain(words, config_dir, rank_command=(sys.executable, "-P", "-m", MODULE, "--rank"))
    from tools.fault_injection import Faults, inject
    from train import rank

    run_dir = Path(arguments[1])
    inject(Faults.read(run_dir / FAULTS_FILE), run_dir / MARKS_FOLDER)
    rank.leave(rank.main(list(arguments[1:])))
    return 1  # never reached


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
