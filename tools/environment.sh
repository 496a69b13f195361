# shellcheck shell=bash
# Sourced by the other scripts: makes .venv once and installs the project into it; quick when nothing changed.
# usage: . tools/environment.sh; make_environment [EXTRA]
# VENV=/path/of/an/environment is used as it is: nothing is installed there, and what is missing is an error.

make_environment() {
    local extra="${1:-}" spec="." stamp fingerprint python
    [ -n "$extra" ] && spec=".[$extra]"
    if [ -n "${VENV:-}" ]; then
        [ -x "$VENV/bin/python" ] || { echo "VENV=$VENV: holds no bin/python; give the folder of a virtual environment" >&2; return 1; }
        "$VENV/bin/python" tools/requirements.py "$extra" >&2 || return 1
        PATH="$(cd "$VENV/bin" && pwd):$PATH"
        # This checkout, whether or not it, or another, is installed there.
        export PYTHONPATH="$PWD"
        # shellcheck disable=SC2317  # the script that sources this calls it
        longhaul() { python -P -m tools.cli "$@"; }
        return
    fi
    python="${PYTHON:-python3}"
    "$python" - <<'PY' || return 1
import shutil, sys
if sys.version_info < (3, 11):
    sys.exit(f"Longhaul needs Python 3.11 or later; {sys.executable} is {sys.version.split()[0]}. Set PYTHON=/path/to/python3.11")
PY
    stamp=".venv/.installed-${extra:-base}"
    fingerprint="$(cat setup.py pyproject.toml tools/constraints.txt | sha256sum | cut -d' ' -f1)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$fingerprint" ]; then
        echo "== environment: installing $spec into .venv (a few minutes the first time, most of it downloads)"
        [ -x .venv/bin/python ] || "$python" -m venv .venv || return 1
        told_pip --upgrade "setuptools>=77" wheel || return 1
        # torch first and by its exact version: later packages then find it and do not choose another build.
        told_pip "$(grep '^torch==' tools/constraints.txt)" || return 1
        told_pip -c tools/constraints.txt -e "$spec" || return 1
        echo "$fingerprint" > "$stamp"
    fi
    # shellcheck source=/dev/null
    . .venv/bin/activate
    unset PYTHONPATH
}

# pip, of whose output a line for each file and each stage is shown. Its errors come by themselves.
told_pip() (
    set -o pipefail
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off "$@" | sed -u -n \
        -e '/\.metadata/d' \
        -e 's/^ *Downloading \([^ ]*\/\)\{0,1\}\([^ ]*\)/   downloading \2/p' \
        -e 's/^ *Using cached \([^ ]*\/\)\{0,1\}\([^ ]*\)/   from the cache \2/p' \
        -e 's/^ *Building wheels\{0,1\} for \(.*\): started/   building \1/p' \
        -e 's/^Installing collected packages.*/   installing what was fetched/p'
)
