#!/usr/bin/env bash
# Long checks, by hand: `tools/campaign.sh` lists them, `tools/campaign.sh NAME [PYTEST ARGUMENTS]` runs one. Interrupted, the
# same command on the same commit leaves out what has passed; .cache/campaigns/NAME-COMMIT.tsv tells outcome and seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

list() {  # name, about how many minutes on two cores with AVX2, what it holds
    cat <<'TABLE'
faults      7  runs of two ranks that meet ten faults under ZeRO 3, a hang and a stopped rank under ZeRO 2, to the bit
layouts    16  every layout where the tests take a few: tensor x data x ZeRO x rows, checkpoints from each to each, likelihoods
memory      2  conversion and proof of large models within bounded memory
benches     1  `longhaul bench` on two processes, and beside a compiled peer
resume     22  `verify-resume` and `chaos` say yes to the program, and no to the program with a mistake of a resume in it
slurm      35  what a cluster does to a run: preemption, chains, sweeps, unfit nodes, time limits, on a real Slurm
TABLE
}

if [ $# = 0 ] || [ "$1" = --help ]; then
    sed -n '2,3s/^# //p' tools/campaign.sh
    printf '\n%-10s %-8s %s\n' name minutes 'what it holds'
    list
    exit
fi
name="$1"; shift
list | grep -q "^$name " || { echo "tools/campaign.sh: no campaign $name; there are: $(list | cut -d' ' -f1 | tr '\n' ' ')" >&2; exit 2; }
commit="$(git rev-parse --short HEAD)" || { echo "tools/campaign.sh: needs the git repository, whose commit names its record" >&2; exit 2; }
[ -z "$(git status --porcelain)" ] || commit="$commit-$({ git status --porcelain; git diff HEAD; } | sha256sum | cut -c1-8)"
exec bash tools/test.sh -m "campaign(name='$name')" --record=".cache/campaigns/$name-$commit.tsv" "$@"
