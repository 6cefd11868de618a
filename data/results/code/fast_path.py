"""Compare the losses of the fast path (flex, compiled layers) with those of the dense reference (sdpa, eager).

usage: python data/results/code/fast_path.py RECIPE OUT.json [key=value ...]

Trains the recipe, whose data is prepared, twice at the same time on one GPU through `blockft train`, and writes
both loss curves and the relative difference of the means of their last 20 losses.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from blockft.bench.measurement import measurement_provenance
from blockft.run_folder import read_metrics

PATHS = {
    "fast": ("model.attention=flex", "train.torch_compile=true"),
    "dense": ("model.attention=sdpa", "train.torch_compile=false"),
}
NUM_LAST = 20


def main() -> None:
    recipe, out, *overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        processes = {
            name: subprocess.Popen(
                [sys.executable, "-m", "blockft", "train", recipe, *overrides, *options,
                 "model.dtype=bfloat16", f"train.output_dir={folder}/{name}"]
            )
            for name, options in PATHS.items()
        }
        for name, process in processes.items():
            if process.wait():
                sys.exit(f"the {name} path ended with code {process.returncode}")
        losses = {
            name: [line["loss"] for line in read_metrics(Path(folder, name)) if "loss" in line] for name in PATHS
        }
    means = {name: statistics.mean(values[-NUM_LAST:]) for name, values in losses.items()}
    result = measurement_provenance() | {
        "command": " ".join(["python", *sys.argv]),
        "recipe": Path(recipe).read_text(encoding="utf-8"),
        "num_steps": len(losses["fast"]),
        f"mean of the last {NUM_LAST} losses": means,
        "relative difference": abs(means["fast"] - means["dense"]) / means["dense"],
        "largest relative difference of a step": max(
            abs(a - b) / b for a, b in zip(losses["fast"], losses["dense"], strict=True)
        ),
        "losses": losses,
    }
    Path(out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name not in ("losses", "recipe")}))
    if not result["relative difference"] <= 0.01:
        sys.exit("the fast path differs from the dense reference by more than 1 %")


if __name__ == "__main__":
    main()
