#!/usr/bin/env bash
# Sets up its own virtual environment, then runs the tests, a file at a time on each core.
# Arguments go to pytest: bash tools/test.sh tests/unit -k sampler; with -n 0 all of it runs in one process (for --pdb).
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh
make_environment dev
ruff check --quiet .
exec python -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
