#!/usr/bin/env bash
# The whole way once, on this machine's CPU: environment, corpus, pretraining with a stop and a resume, baseline, evaluation,
# sample, export.
# Nothing to configure. Run it again and finished stages are passed over.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh

say() { printf '\n== %s\n' "$*"; }
started=$SECONDS

make_environment
unset PYTHONPATH
ready=$SECONDS
CORPUS=data/stdlib RUN=runs/quickstart MODEL=exported/quickstart

say "1/7 corpus: the Python standard library's source text -> BPE -> token shards"
longhaul prepare corpus=stdlib tokenizer.vocab_size=2048 output="$CORPUS"

if [ ! -e "$RUN/FINISHED" ] && [ ! -e "$RUN/checkpoints" ]; then
    say "2/7 pretrain: DeepSpeed ZeRO 1 on the CPU, stopped on purpose in the middle (exit code 85: saved, go on later)"
    code=0
    longhaul pretrain experiment=quickstart budget.stop_at_step=800 || code=$?
    [ "$code" = 85 ] || { echo "quickstart: expected exit code 85, got $code" >&2; exit 1; }
fi

say "3/7 pretrain: the same command again goes on from the newest checkpoint to the end"
longhaul pretrain experiment=quickstart

say "4/7 baseline: an interpolated bigram model fitted on the very tokens that the model saw"
longhaul baseline run="$RUN"

say "5/7 evaluate: a window over each held-out document, so that most targets see at least 64 tokens; intervals by the bootstrap"
[ -e "$RUN/evaluations" ] || longhaul evaluate checkpoint="$RUN" wandb.mode=disabled

say "6/7 sample: what the model makes of 'def read_file('"
longhaul generate checkpoint="$RUN" prompt='def read_file(' max_new_tokens=80 temperature=0.7 top_k=40 seed=1

say "7/7 export to the Hugging Face format, with the proof that transformers computes the same"
[ -e "$MODEL/conversion_report.json" ] || longhaul export checkpoint="$RUN" out="$MODEL" proof_sequences=null
python - "$MODEL/conversion_report.json" <<'PY'
import json, sys
loss = json.load(open(sys.argv[1]))["proof"]["held_out_loss"]
print(f"held-out loss    {loss['longhaul']:.6f} here, {loss['transformers']:.6f} in transformers")
PY

cat <<EOF

== done: $((ready - started)) s for the environment, $((SECONDS - ready)) s for the main job
  environment      .venv                        (source .venv/bin/activate)
  corpus           $CORPUS                  (manifest.json: what was read, kept and set aside)
  run              $RUN              (config.yaml, metrics.jsonl, logs, checkpoints, TensorBoard, W&B offline)
  model            $MODEL          (a Hugging Face folder; conversion_report.json is the proof)

next, for example:
  longhaul pretrain --help
  longhaul generate checkpoint=$RUN prompt='class Node:' num_samples=3
  longhaul pretrain experiment=quickstart parallel=zero3 budget.steps=200 budget.tokens=null run.name=zero3
EOF
