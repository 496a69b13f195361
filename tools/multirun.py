"""`-m`: one process per combination of the comma-separated values, one after another, each with a run name of its own."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence

from conf.errors import ConfigError


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the sweeps in `overrides`, in Hydra's grammar and order.

    Raises ConfigError for a word that Hydra cannot read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    choices: list[list[str]] = []
    for word in overrides:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            raise ConfigError([f"{word}: {' '.join(str(error).split())}"]) from None
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([word])
    return [list(combination) for combination in itertools.product(*choices)]


def run_all(verb: str, overrides: Sequence[str], config_dir: str | None) -> int:
    """Run `longhaul verb` once for each combination; returns the highest exit code."""
    jobs = combinations(overrides)
    given = [word.partition("=")[2] for word in overrides if word.startswith("run.name=")]
    codes = []
    for number, job in enumerate(jobs):
        words = list(job)
        if len(jobs) > 1 and verb == "pretrain" and not any("," in name for name in given):
            words = [word for word in words if not word.startswith("run.name=")]
            words.append(f"run.name={(given or ['sweep'])[0]}/{number:03d}")
        print(f"job {number + 1} of {len(jobs)}: longhaul {verb} {' '.join(words)}", flush=True)
        command = [sys.executable, "-P", "-m", "tools.cli", verb, *words]
        command += ["--config-dir", config_dir] if config_dir else []
        codes.append(subprocess.run(command, check=False).returncode)
    if len(jobs) > 1:
        print(f"{codes.count(0)} of {len(jobs)} jobs ended with exit code 0; codes: {codes}")
    return max(codes, key=abs, default=0)
