#!/usr/bin/env bash
# Train the demo's base model from random weights, with full attention only, in four stages. Each stage starts
# from the model of the stage before. Run it in the root folder of the project. It replaces the folder
# out/demo-base, which the recipe names; the base model is out/demo-base/train-model.
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
