"""Peak memory and speed of `blockft train` with a 4-bit base model, with random weights.

usage: python data/results/code/qlora_points.py OUT.json [--shape NAME] [--row-len N] [--max-steps N]
           [--overrides "key=value ..."] ...

Writes synthetic questions and a tokenizer, prepares them, and trains each list of overrides in a process of its
own. The default is one list: the recipe `llama-3.1-8b-qlora` in short. Weights are drawn on the device and
quantized matrix by matrix. With a GPU, codes and decoded matrices are first compared with those of the CPU.
`--shape tiny --row-len 4096` tries the script on a CPU.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from blockft.bench.measurement import measurement_provenance, measure_ms
from blockft.bench.synthetic_source import save_tokenizer, write_source
from blockft.model.load import load_tokenizer
from blockft.model.nf4 import dequantize, quantize
from blockft.model.nf4_linear import decode_matrix
from blockft.model.random_model import load_shape_config
from blockft.run_folder import read_metrics

QLORA = "model.quantization=nf4 train.optimizer=adamw_8bit train.gradient_checkpointing=full"
NUM_SAMPLES = 80
NUM_WARMUPS = 1
MIN_IDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--row-len", type=int, default=8192)
    parser.add_argument("--max-steps", type=int, default=6)
    parser.add_argument("--overrides", action="append", help="settings of a point; repeat it for more points")
    options = parser.parse_args()
    result = measurement_provenance() | {
        "command": " ".join(["python", "data/results/code/qlora_points.py", *sys.argv[1:]]),
        "shape": options.shape,
        "row_len": options.row_len,
    }
    if torch.cuda.is_available():
        result["GPU against CPU"] = compare_with_cpu()
        print(json.dumps(result["GPU against CPU"]), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, options.shape)
        recipe = write_recipe(folder, options.row_len, options.max_steps)
        subprocess.run([sys.executable, "-m", "blockft", "prepare", str(recipe)], check=True)
        result["recipe"] = recipe.read_text(encoding="utf-8").replace(f"{folder}/", "")
        result["points"] = []
        for index, overrides in enumerate(options.overrides or [QLORA]):
            result["points"].append(train(recipe, folder / f"run-{index}", overrides))
            print(json.dumps(result["points"][-1]), flush=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def write_inputs(folder: Path, shape: str) -> None:
    """Write questions, and a model folder without weights, whose tokenizer was trained on the questions."""
    source = folder / "source.jsonl"
    write_source(source, NUM_SAMPLES, 0)
    config = load_shape_config(shape)
    save_tokenizer(folder / "model", source, num_ids=max(MIN_IDS, config.vocab_size))
    tokenizer = load_tokenizer(str(folder / "model"))
    config.eos_token_id, config.bos_token_id, config.pad_token_id = tokenizer.eos_token_id, None, None
    config.save_pretrained(folder / "model")


def write_recipe(folder: Path, row_len: int, max_steps: int) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""\
model:
  path: {folder}/model
  init: random
data:
  output_dir: {folder}/data
  row_len: {row_len}
  sources: [{{format: fid, path: {folder}/source.jsonl}}]
train:
  output_dir: {folder}/run
  deepspeed: zero1
  lora: {{r: 32, lora_alpha: 64}}
  learning_rate: 1e-4
  batch_rows: 1
  max_steps: {max_steps}
  save_steps: 1000
""",
        encoding="utf-8",
    )
    return recipe


def train(recipe: Path, run: Path, overrides: str) -> dict[str, Any]:
    """Train a point, and return its figures."""
    command = [sys.executable, "-m", "blockft", "train", str(recipe), f"train.output_dir={run}"]
    begun = time.monotonic()
    code = subprocess.run([*command, *shlex.split(overrides)]).returncode
    metrics = [line for line in read_metrics(run) if "loss" in line] if code == 0 else []
    speeds = [line["tokens_per_s"] for line in metrics[NUM_WARMUPS:]]
    return {
        "overrides": overrides,
        "exit_code": code,
        "seconds": time.monotonic() - begun,
        "median_tokens_per_s": statistics.median(speeds) if speeds else None,
        "peak_memory_gib": max((line.get("peak_memory_gib", 0) for line in metrics), default=None),
        "checkpoint_bytes": sum(file.stat().st_size for file in run.rglob("*") if file.is_file()),
        "metrics": metrics,
    }


def compare_with_cpu() -> dict[str, Any]:
    """Compare quantized weights and decoded matrices of the GPU with those of the CPU, bit by bit."""
    compared: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = (0.02 * torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))).to(dtype)
        on_cpu, on_gpu = quantize(weight), quantize(weight.cuda())
        decoded = decode_matrix(on_gpu.codes, on_gpu.scales, on_gpu.groups, weight.shape, dtype, dtype).cpu()
        compared[str(dtype)] = {
            name: torch.equal(getattr(on_cpu, name), getattr(on_gpu, name).cpu())
            for name in ("codes", "scales", "groups")
        } | {"matrix": torch.equal(decoded, dequantize(on_cpu, weight.shape, dtype))}
    shape = (14336, 4096)
    parts = quantize(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
    compared["decode a matrix of 14336 x 4096"] = measure_ms(
        lambda: decode_matrix(parts.codes, parts.scales, parts.groups, shape, torch.bfloat16, torch.bfloat16),
        warmups=3,
        runs=20,
    )
    return compared


if __name__ == "__main__":
    main()
