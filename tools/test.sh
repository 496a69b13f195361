#!/usr/bin/env bash
# Sets up its own virtual environment, then runs the tests. Arguments go to pytest: bash tools/test.sh tests/unit -k sampler
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh
make_environment dev
unset PYTHONPATH
ruff check --quiet .
exec python -m pytest "$@"
