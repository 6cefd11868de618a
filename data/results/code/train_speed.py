"""Measures `blockft train` on one GPU: the recipe's samples, random weights of a known shape, a few steps.

usage: python data/results/code/train_speed.py --save SHAPE FOLDER TOKENIZER
       python data/results/code/train_speed.py SHAPE NAME --models FOLDER --data FOLDER --recipe FILE
           --code FOLDER --out FOLDER [--steps N] [key=value ...]

Writes OUT/NAME.json: tokens without padding per second of each step, losses, peak memory, the command. The
first command draws the weights on the GPU and saves them: FOLDER is the folder SHAPE of --models. `--code` is
the folder of the package to measure, so that two commits can be measured on one card. `--prepare FILE` starts
the imports at once, and the run when FILE exists: several measurements then follow each other without waiting
for imports.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

PRELOAD = """
import sys, time
from pathlib import Path
import torch, transformers, peft, accelerate, deepspeed, torch._inductor.compile_fx
from transformers.models.llama import modeling_llama
sys.path.remove("")  # the working directory may hold another version of the package
go = sys.argv.pop(1)
while go != "-" and not Path(go).exists():
    time.sleep(0.1)
sys.argv[0] = "blockft"
from blockft.cli import main
main()
"""


def save_model(shape: str, folder: Path, tokenizer: Path) -> None:
    """Draw the weights of a shape on the GPU and save them with a tokenizer."""
    import torch

    import blockft.model.load  # noqa: F401  (registers the attention backends)
    from blockft.model.random_model import build_random_model, load_shape_config

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_random_model(load_shape_config(shape), device=device, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)


def used_mib() -> int:
    """Return the memory in use on the card of this process, in MiB; 0 without a GPU."""
    if not shutil.which("nvidia-smi"):
        return 0
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    command = ["nvidia-smi", "-i", card, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])


def read_metrics(run: Path) -> list[dict[str, float]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("name")
    parser.add_argument("overrides", nargs="*")
    for option in ("--models", "--data", "--recipe", "--code", "--out"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--timeout", type=int, default=180)
    parser.add_argument("--commit", default="")
    parser.add_argument("--prepare", default="-")
    parser.add_argument("--after", default="")
    options = parser.parse_intermixed_args()
    folder, run = options.models / options.shape, options.models / f"run-{options.name}"
    overrides = [
        f"model.path={folder}",
        f"data.output_dir={options.data}",
        f"train.output_dir={run}",
        "train.torch_compile=true",
        "train.save_steps=100000",
        *options.overrides,
    ]
    command = ["train", str(options.recipe), *overrides]
    environment = {**os.environ, "PYTHONPATH": f"{options.code}:{os.environ.get('PYTHONPATH', '')}"}
    log = (options.out / f"{options.name}.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", PRELOAD, options.prepare, *command], env=environment, stdout=log, stderr=log
    )
    while options.prepare != "-" and not Path(options.prepare).exists():
        time.sleep(0.1)
    time.sleep(1)  # until the memory of the run before is free
    others = used_mib()
    start, peak, first_step_s, metrics = time.monotonic(), 0, None, []
    while process.poll() is None and time.monotonic() - start < options.timeout:
        metrics = read_metrics(run)
        if metrics and first_step_s is None:
            first_step_s = time.monotonic() - start
        if len(metrics) >= options.steps:
            break
        peak = max(peak, used_mib() - others)
        time.sleep(0.3)
    process.kill()  # without the checkpoint of the last step
    process.wait()
    if options.after:
        Path(options.after).touch()
    speeds = [line["tokens_per_s"] for line in metrics][options.warmups :]
    import torch

    result = {
        "command": " ".join(["blockft", *command]),
        "commit": options.commit,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "python": platform.python_version(),
        "versions": {n: version(n) for n in ("torch", "transformers", "peft", "deepspeed")},
        "shape": options.shape,
        "median_tokens_per_s": statistics.median(speeds) if speeds else None,
        "peak_mib_of_the_card": peak,
        "seconds_from_imports_to_the_first_step": first_step_s,
        "warmup_steps": options.warmups,
        "metrics": metrics,
    }
    (options.out / f"{options.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    speed = f"{result['median_tokens_per_s']:,.0f}" if speeds else "FAILED"
    losses = ", ".join(f"{line['loss']:.4f}" for line in metrics[-2:])
    print(f"{options.name}: {speed} tokens/s, {peak} MiB, first step {first_step_s}, losses {losses}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--save":
        save_model(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
