# Sourced by the other scripts: makes .venv once and installs the project into it; quick when nothing changed.
# usage: . tools/environment.sh; make_environment [EXTRA]

make_environment() {
    local extra="${1:-}" spec="." stamp fingerprint python
    [ -n "$extra" ] && spec=".[$extra]"
    python="${PYTHON:-python3}"
    "$python" - <<'PY' || return 1
import shutil, sys
if sys.version_info < (3, 11):
    sys.exit(f"Longhaul needs Python 3.11 or later; {sys.executable} is {sys.version.split()[0]}. Set PYTHON=/path/to/python3.11")
PY
    stamp=".venv/.installed-${extra:-base}"
    fingerprint="$(cat setup.py pyproject.toml tools/constraints.txt | sha256sum | cut -d' ' -f1)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$fingerprint" ]; then
        echo "== environment: installing $spec into .venv (a few minutes the first time)"
        [ -x .venv/bin/python ] || "$python" -m venv .venv || return 1
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "setuptools>=77" wheel || return 1
        # torch first and by its exact version: later packages then find it and do not choose another build.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' tools/constraints.txt)" || return 1
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt -e "$spec" || return 1
        echo "$fingerprint" > "$stamp"
    fi
    . .venv/bin/activate
}
