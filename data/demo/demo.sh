#!/usr/bin/env bash
# The demo: a tiny model that reads with full attention loses its way under the block mask, and wins it back.
# Run at the top of the project; the folder out/demo, which the recipe names, is begun afresh.
set -euo pipefail
out=out/demo
step() { printf '\n== %s\n' "$*"; }
rm -rf "$out" && mkdir -p "$out"

step "an invented world: documents, and questions that only the right documents answer"
python data/demo/world.py "$out/world" --scenes 1500
step "the base model, trained with full attention alone, on held-out questions"
blockft eval data/demo/model demo eval.output_dir=out/demo/before
step "block fine-tuning, both views, under DeepSpeed"
blockft prepare demo
blockft train demo
step "export, and the same questions again"
blockft export "$out/run" "$out/model"
blockft eval "$out/model" demo eval.output_dir=out/demo/after
step "before and after"
blockft compare "$out/before" "$out/after" --png "$out/demo.png"
echo "plot: $out/demo.png; loss: $out/run/loss.png; the model: $out/model"
