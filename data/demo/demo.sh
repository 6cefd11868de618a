#!/usr/bin/env bash
# The demo: fine-tune a tiny model, trained with full attention, so that it answers in block mode as well.
# Run it in the root folder of the project. It replaces the folder out/demo, which the recipe names.
set -euo pipefail
out=out/demo
step() { printf '\n== %s\n' "$*"; }
rm -rf "$out" && mkdir -p "$out"

step "an invented world: documents, and questions that only the right documents answer"
python data/demo/world.py "$out/world" --scenes 1500
step "the base model, trained only with full attention, on held-out questions"
blockft eval data/demo/model demo eval.output_dir=out/demo/before
step "block fine-tuning in both modes, under DeepSpeed"
blockft prepare demo
blockft train demo
step "export, and the same questions again"
blockft export "$out/run" "$out/model"
blockft eval "$out/model" demo eval.output_dir=out/demo/after
step "before and after"
blockft compare "$out/before" "$out/after" --png "$out/demo.png"
echo "plot: $out/demo.png; loss: $out/run/loss.png; the model: $out/model"
