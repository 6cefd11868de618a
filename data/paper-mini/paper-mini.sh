#!/usr/bin/env bash
# The paper's table at small scale: SmolLM2-135M fine-tuned in four ways on the same data, steps and seeds.
# Hardware: one GPU; a CPU for a try, with overrides that make everything small.
# Run it in the top folder of the project. After an interruption run it again: it skips finished parts.
#
#   make paper-mini MODEL=folder/of/SmolLM2-135M-Instruct
#   bash data/paper-mini/paper-mini.sh [KEY=VALUE ...]      overrides of recipe.yaml beside it, for all parts
set -euo pipefail
model=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
out=${FOLDER:-out/paper-mini}
# bm25 ranks the ten documents of a question, and the best one stands next to it; 2,000 of 11,058 samples are
# chats. All models train for 1,000 steps: one epoch in both modes, as in the paper, or two epochs in one mode
common=(data/paper-mini/recipe.yaml "model.path=$model" "data.output_dir=$out/data" data.row_len=32768
  data.order=ascending data.sources.2.retriever=bm25 data.sources.3.retriever=bm25
  data.sources.4.retriever=bm25 data.sources.5.max_samples=2000 train.batch_rows=1 train.learning_rate=2.5e-4
  train.num_train_epochs=3 train.max_steps=1000 train.save_steps=500
  train.num_eval_examples=0 eval.batch_size=32 eval.sources.2.retriever=bm25 eval.sources.3.retriever=bm25
  eval.sources.0.max_samples=200 eval.sources.1.max_samples=200 eval.sources.2.max_samples=200
  eval.sources.3.max_samples=200 "$@")
step() { printf '\n== %s\n' "$*"; }

mkdir -p "$out"
printf '%s\n' "${common[@]}" > "$out/.settings"
if ! cmp -s "$out/.settings" "$out/settings" && [ -e "$out/settings" ]; then
  echo "$out was started with other settings (see $out/settings): use those, or choose another FOLDER" >&2
  exit 2
fi
mv "$out/.settings" "$out/settings"

prepare() {
  [ -e "$out/data/manifest.json" ] && return
  step "the data of all four"
  blockft prepare "${common[@]}"
}
train() { # NAME [KEY=VALUE ...]
  local name=$1 run=$out/$1/run model=$out/$1/model resume=()
  shift
  [ -e "$model" ] && return
  step "training: $name"
  [ -e "$run" ] && resume=(--resume)
  blockft train "${common[@]}" "train.output_dir=$run" "$@" "${resume[@]}"
  blockft export "$run" "$model"
}
evaluate() { # NAME MODEL MODES
  [ -e "$out/$1/eval" ] && return
  step "evaluation: $1"
  blockft eval "$2" "${common[@]}" "eval.output_dir=$out/$1/eval" --modes "$3"
}

prepare
train full "data.modes=[full]"
evaluate full "$out/full/model" full,block
train both
evaluate both "$out/both/model" full,block
train local data.positions=local
evaluate local "$out/local/model" block
train block-only "data.modes=[block]"
evaluate block-only "$out/block-only/model" block
evaluate before "$model" full,block
step "the table"
# a try with overrides is no result
results=${RESULTS:-$([ $# -eq 0 ] && echo data/results/paper-mini || echo "$out/paper-mini")}
python data/paper-mini/table.py "$out" "$results"
