#!/usr/bin/env bash
# Trains the demo's base model from nothing, with full attention alone, in four stages that begin where the last one ended.
# Run at the top of the project; the folder out/demo-base, which the recipe names, is begun afresh. The model is its train-model.
set -euo pipefail
out=out/demo-base
rm -rf "$out" && mkdir -p "$out"
python data/demo/world.py "$out/world" --scenes 30000
python data/demo/blank.py "$out/blank"

stage() { # NAME STEPS MODEL [KEY=VALUE ...]
  local name=$1 steps=$2 model=$3
  shift 3
  blockft prepare demo-base data.output_dir="$out/$name-data" data.sources.0.path="$out/world/$name.jsonl"
  blockft train demo-base data.output_dir="$out/$name-data" train.output_dir="$out/$name" model.path="$model" \
    train.max_steps="$steps" "$@"
  blockft export "$out/$name" "$out/$name-model"
}
stage recall 1600 "$out/blank" model.init=random
stage pairs 200 "$out/recall-model"
stage facts 300 "$out/pairs-model"
stage train 800 "$out/facts-model"
