#!/usr/bin/env bash
# Lets another revision and this tree resume the runs that tests/golden holds, and compares what they write to the bit:
#   bash tools/compare_revision.sh REV [RUN ...]
# Each has its own copy of a run, and reads it with its own code; the Python and its packages are the same. One line is printed
# for a run. Exit code 0: equal, or different as tests/golden/declared_changes.yaml declares; 1: some run differs otherwise, or
# cannot be resumed; 2: nothing was compared. The Python is that of the active environment, or PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
here="$PWD" golden="$PWD/tests/golden" python="${PYTHON:-python}"

fail() {
    echo "compare_revision: $*" >&2
    exit 2
}

[ "$#" -ge 1 ] || fail "give a revision: bash tools/compare_revision.sh REV [RUN ...]"
revision="$1"
shift
git rev-parse --git-dir > /dev/null 2>&1 || fail "$here: is no git repository, so it has no other revision"
commit="$(git rev-parse --verify --quiet "$revision^{commit}")" ||
    fail "$revision: no such revision here; fetch it, or give one that \`git log\` shows"
"$python" -c 'from importlib.util import find_spec as find; exit(not (find("torch") and find("deepspeed")))' ||
    fail "$python: lacks torch or deepspeed; activate the environment (tools/environment.sh makes it), or set PYTHON"
runs=("$@")
[ "$#" -gt 0 ] || mapfile -t runs < <(cd "$golden/runs" && ls)
for run in "${runs[@]}"; do
    [ -f "$golden/runs/$run/words.txt" ] || fail "$run: no such run; there are: $(cd "$golden/runs" && echo *)"
done

work="$(mktemp -d)"
# shellcheck disable=SC2317  # called by the trap
finish() {
    local job
    for job in $(jobs -p); do
        kill "$job" 2> /dev/null || true # it ends its ranks itself
    done
    wait
    git worktree remove --force "$work/tree" 2> /dev/null || true
    rm -rf "$work"
    git worktree prune
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
git worktree add --quiet --detach "$work/tree" "$commit"
cp "$work/tree/tests/golden/declared_changes.yaml" "$work/declared_before.yaml" 2> /dev/null || true

# resume TREE PLACE RUN: copy the run to PLACE and let TREE resume it to its end, by the words that it was started with.
# Replaces the shell that it is called in, so that a signal to it reaches the program.
resume() {
    local tree="$1" place="$2" run="$3" words
    mkdir -p "$place/runs"
    cp -a "$golden/data" "$place/data"
    cp -a "$golden/runs/$run" "$place/runs/$run"
    mapfile -t words < "$place/runs/$run/words.txt"
    cd "$place"
    exec env PYTHONPATH="$tree" OMP_NUM_THREADS=1 "$python" -P -m tools.cli "${words[@]}" > "$place/log" 2>&1
}

# failed WHO PLACE CODE RUN: say that a run could not be resumed.
failed() {
    echo "$(printf '%-30s' "$4") FAILED in $1 with exit code $3; the end of what it printed:"
    tail -n 15 "$2/log" | sed 's/^/    | /'
}

echo "$revision ($(git log -1 --format='%h %s' "$commit")) against this tree ($(git describe --always --dirty))"
code=0 compared=0
for run in "${runs[@]}"; do
    made="$(sed -n 's/.*"commit": "\([0-9a-f]*\)".*/\1/p' "$golden/runs/$run/expected.json")"
    if git cat-file -e "$made" 2> /dev/null && ! git merge-base --is-ancestor "$made" "$commit"; then
        echo "$(printf '%-30s' "$run") not compared: was made by ${made:0:7}, which $revision does not contain"
        continue
    fi
    compared=1
    before="$work/before" after="$work/after"
    mkdir "$before" "$after"
    (resume "$work/tree" "$before" "$run") & first=$!
    (resume "$here" "$after" "$run") & second=$!
    first_code=0 second_code=0 result=0
    wait "$first" || first_code=$?
    wait "$second" || second_code=$?
    if [ "$first_code" -ne 0 ] || [ "$second_code" -ne 0 ]; then
        [ "$first_code" -eq 0 ] || failed "$revision" "$before" "$first_code" "$run"
        [ "$second_code" -eq 0 ] || failed "this tree" "$after" "$second_code" "$run"
        result=1
    else
        PYTHONPATH="$here" "$python" -P -m tools.compare_revision "$run" "$before/runs/$run" "$after/runs/$run" \
            "$golden/declared_changes.yaml" "$work/declared_before.yaml" || result=$?
    fi
    [ "$result" -le "$code" ] || code="$result"
    rm -rf "$before" "$after"
done
[ "$compared" = 1 ] || fail "$revision: contains the maker of no recorded run; nothing was compared"
exit "$code"
