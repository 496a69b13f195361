#!/usr/bin/env bash
# The whole way once, on this machine's CPU: environment, corpus, pretraining with a stop and a resume, baseline, sample, export;
# then two tasks, each with simple means to compare with, measured before and after fine-tuning.
# Nothing to configure: the first steps of the pretraining tell how fast this machine is, and all sizes follow from that.
# Run it again and finished stages are passed over. VENV=/path/of/an/environment takes one that has all that is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=tools/environment.sh
. tools/environment.sh

say() { printf '\n== %s\n' "$*"; }
started=$SECONDS

make_environment ""
ready=$SECONDS
CORPUS=data/stdlib RUN=runs/quickstart MODEL=exported/quickstart TASKS=data/stdlib_tasks
decide() { python -P -W ignore -m tools.quickstart "$@"; }
# A rank a core, two at most: 512 tokens are little to share.
RANKS="$(python -c 'import os; print(min(2, len(os.sched_getaffinity(0))))')"
TRAIN=(launch.processes="$RANKS" launch.device=cpu)

say "1/9 corpus: the Python standard library's source text -> BPE -> token shards"
# A fifth of the files is held out, and they are more than the run could read anyway: the tasks at the end are tested on them.
longhaul prepare corpus=stdlib tokenizer.vocab_size=2048 held_out_fraction=0.2 output="$CORPUS"

if [ ! -e "$RUN/sizes.json" ]; then
    say "2/9 pretrain: DeepSpeed ZeRO 1 on the CPU, stopped on purpose after 40 steps (exit code 85: saved, to be resumed)"
    code=0
    longhaul pretrain experiment=quickstart "${TRAIN[@]}" budget.stop_at_step=40 || code=$?
    [ "$code" = 85 ] || { echo "quickstart: expected exit code 85, got $code" >&2; exit 1; }
fi
decide size "$RUN" $((SECONDS - ready))
read -r STEPS CLASSIFICATION_STEPS SUMMARISATION_STEPS ROWS < <(decide sizes "$RUN")

say "3/9 pretrain: resumed from the newest checkpoint, with the budget that fits this machine"
longhaul pretrain experiment=quickstart "${TRAIN[@]}" budget.tokens=null budget.steps="$STEPS"

say "4/9 baseline: an interpolated bigram model fitted on the very tokens that the model saw; 0.1 nats below it, or the end"
longhaul baseline run="$RUN" margin=0.1

say "5/9 sample: what the model makes of 'def read_file('"
longhaul generate checkpoint="$RUN" prompt='def read_file(' max_new_tokens=80 temperature=0.7 top_k=40 seed=1 device=cpu

say "6/9 export to the Hugging Face format, with the proof that transformers computes the same, or the end"
[ -e "$MODEL/conversion_report.json" ] || longhaul export checkpoint="$RUN" out="$MODEL"
decide proof "$MODEL/conversion_report.json"

say "7/9 two tasks of the standard library's docstrings, and what simple means reach on them"
longhaul stdlib-tasks out="$TASKS" held_out_of="$CORPUS" most_held_out="$ROWS"
rows_of() { printf '%s=[{path: %s}]' "$1" "$TASKS/$2.jsonl"; }
LABELS="$(python -c 'import json, sys; print(",".join(json.load(open(sys.argv[1]))["labels"]))' "$TASKS/manifest.json")"
# What is written here of the tasks is for the model that has not learned them: a prompt, and for labels their texts behind it.
PACKAGE=(task=classification task.name=package "$(rows_of task.data classification/test)")
ASKED=('task.prompt="""{text}"""\nimport' "task.labels=[$LABELS]")
FIRST_LINE=(task=summarisation task.name=first_line "$(rows_of task.data summarisation/test)" 'task.stop=["\n"]'
    'task.prompt={body}\n\n{signature}\n    """' task.target_prefix= task.max_new_tokens=32)
simple_means() {  # TASK SETTING...
    local out="$TASKS/$1/baseline.json"
    [ -e "$out" ] || longhaul task-baseline task="$1" out="$out" "$(rows_of task.data "$1/train")" \
        "$(rows_of task.validation "$1/test")" "${@:2}"
}
simple_means classification
simple_means summarisation copy=name
measure() {  # RUN OUT SETTING...
    local run="$1" out="$1/evaluations/$2"; shift 2
    [ -e "$out" ] || longhaul evaluate checkpoint="$run" out="$out" wandb.mode=disabled device=cpu processes="$RANKS" "$@"
}
finetune() {  # TASK STEPS
    longhaul finetune experiment="quickstart_$1" "${TRAIN[@]}" budget.epochs=null budget.steps="$2"
}

say "8/9 fine-tune: which package is a docstring from? before: the most likely of the names behind a prompt; after: a head"
measure "$RUN" package "${PACKAGE[@]}" "${ASKED[@]}"
finetune classification "$CLASSIFICATION_STEPS"
measure runs/quickstart_classification package "${PACKAGE[@]}"

say "9/9 fine-tune: write a docstring's first line from the function; before and after behind the same prompt"
measure "$RUN" first_line "${FIRST_LINE[@]}"
finetune summarisation "$SUMMARISATION_STEPS"
measure runs/quickstart_summarisation first_line "${FIRST_LINE[@]}"

decide scores "$TASKS" "$RUN"

cat <<EOF

== done: $((ready - started)) s for the environment, $((SECONDS - ready)) s for the main job
  environment      ${VENV:-.venv}                        (source ${VENV:-.venv}/bin/activate)
  corpus           $CORPUS                  (manifest.json: what was read, kept and set aside)
  run              $RUN              (config.yaml, metrics.jsonl, logs, checkpoints, TensorBoard, W&B offline)
  model            $MODEL          (a Hugging Face folder; conversion_report.json is the proof)
  tasks            $TASKS            (rows as JSONL, and what simple means reach on them)
  fine-tuned       runs/quickstart_classification, runs/quickstart_summarisation

next, for example:
  longhaul pretrain --help
  longhaul generate checkpoint=$RUN prompt='class Node:' num_samples=3
  longhaul pretrain experiment=quickstart parallel=zero3 optim=adamw budget.steps=200 budget.tokens=null run.name=zero3
EOF
