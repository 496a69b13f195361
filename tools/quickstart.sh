#!/usr/bin/env bash
# The whole way once, on this machine's CPU: environment, corpus, pretraining with a stop and a resume, baseline, evaluation,
# sample, export; then two tasks, each with simple means to compare with, measured before and after fine-tuning.
# Nothing to configure. Run it again and finished stages are passed over.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh

say() { printf '\n== %s\n' "$*"; }
started=$SECONDS

make_environment
unset PYTHONPATH
ready=$SECONDS
CORPUS=data/stdlib RUN=runs/quickstart MODEL=exported/quickstart TASKS=data/stdlib_tasks
PRETRAIN=(experiment=quickstart evaluate.max_samples=1000)

say "1/10 corpus: the Python standard library's source text -> BPE -> token shards"
# A fifth of the files is held out, and they are more than the run could read anyway: the tasks at the end are tested on them.
longhaul prepare corpus=stdlib tokenizer.vocab_size=2048 held_out_fraction=0.2 output="$CORPUS"

if [ ! -e "$RUN/FINISHED" ] && [ ! -e "$RUN/checkpoints" ]; then
    say "2/10 pretrain: DeepSpeed ZeRO 1 on the CPU, stopped on purpose in the middle (exit code 85: saved, go on later)"
    code=0
    longhaul pretrain "${PRETRAIN[@]}" budget.stop_at_step=800 || code=$?
    [ "$code" = 85 ] || { echo "quickstart: expected exit code 85, got $code" >&2; exit 1; }
fi

say "3/10 pretrain: the same command again goes on from the newest checkpoint to the end"
longhaul pretrain "${PRETRAIN[@]}"

say "4/10 baseline: an interpolated bigram model fitted on the very tokens that the model saw"
longhaul baseline run="$RUN"

say "5/10 evaluate: a window over 20 held-out documents, most targets see at least 64 tokens; intervals by the bootstrap"
[ -e "$RUN/evaluations/text" ] || longhaul evaluate checkpoint="$RUN" limit=20 out="$RUN/evaluations/text" wandb.mode=disabled

say "6/10 sample: what the model makes of 'def read_file('"
longhaul generate checkpoint="$RUN" prompt='def read_file(' max_new_tokens=80 temperature=0.7 top_k=40 seed=1

say "7/10 export to the Hugging Face format, with the proof that transformers computes the same"
[ -e "$MODEL/conversion_report.json" ] || longhaul export checkpoint="$RUN" out="$MODEL" proof_sequences=1000
python - "$MODEL/conversion_report.json" <<'PY'
import json, sys
loss = json.load(open(sys.argv[1]))["proof"]["held_out_loss"]
print(f"held-out loss    {loss['longhaul']:.6f} here, {loss['transformers']:.6f} in transformers")
PY

say "8/10 two tasks of the standard library's docstrings, and what simple means reach on them"
longhaul stdlib-tasks out="$TASKS" held_out_of="$CORPUS"
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
    [ -e "$out" ] || longhaul evaluate checkpoint="$run" out="$out" wandb.mode=disabled "$@"
}

say "9/10 fine-tune: which package is a docstring from? before: the likeliest of the names behind a prompt; after: a head"
measure "$RUN" package "${PACKAGE[@]}" "${ASKED[@]}"
longhaul finetune experiment=quickstart_classification
measure runs/quickstart_classification package "${PACKAGE[@]}"

say "10/10 fine-tune: write a docstring's first line from the function; before and after behind the same prompt"
measure "$RUN" first_line "${FIRST_LINE[@]}"
longhaul finetune experiment=quickstart_summarisation
measure runs/quickstart_summarisation first_line "${FIRST_LINE[@]}"

python - "$TASKS" "$RUN" <<'PY'
import json, sys
tasks, run = sys.argv[1:]
def shown(score):
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
print(f"\n{'on files that neither model has read':<44}{'figure':<10}value and 95% interval")
asked = {"classification": ("package", ("accuracy", "f1_macro")), "summarisation": ("first_line", ("rouge1", "rougeL"))}
for task, (name, figures) in asked.items():
    means = json.load(open(f"{tasks}/{task}/baseline.json"))["scores"]
    for where, title in ((run, "before"), (f"{run}_{task}", "after")):
        means[f"{title} fine-tuning"] = json.load(open(f"{where}/evaluations/{name}/evaluation.json"))["scores"]
    for title, scores in means.items():
        for figure in figures:
            print(f"{task:<16}{title:<28}{figure:<10}{shown(scores[figure])}")
PY

cat <<EOF

== done: $((ready - started)) s for the environment, $((SECONDS - ready)) s for the main job
  environment      .venv                        (source .venv/bin/activate)
  corpus           $CORPUS                  (manifest.json: what was read, kept and set aside)
  run              $RUN              (config.yaml, metrics.jsonl, logs, checkpoints, TensorBoard, W&B offline)
  model            $MODEL          (a Hugging Face folder; conversion_report.json is the proof)
  tasks            $TASKS            (rows as JSONL, and what simple means reach on them)
  fine-tuned       runs/quickstart_classification, runs/quickstart_summarisation

next, for example:
  longhaul pretrain --help
  longhaul generate checkpoint=$RUN prompt='class Node:' num_samples=3
  longhaul pretrain experiment=quickstart parallel=zero3 budget.steps=200 budget.tokens=null evaluate.max_samples=1000 run.name=zero3
EOF
