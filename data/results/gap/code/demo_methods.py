"""Every method of `blockft eval --method` on the demo's base model: baselines without block fine-tuning.

python data/results/gap/code/demo_methods.py run WORK OUT.json    asks the demo's 1,200 held-out questions
python data/results/gap/code/demo_methods.py show OUT.json        prints the table

The temperature and the scale of `ape` are chosen on training questions (`NUM_CHOOSING` of them); the file
holds the scores of all pairs. Run it in the root folder of the project; WORK is a folder for the world.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from demo_world import read_hits
from numpy.typing import NDArray
from scores import interval, resampled_mean

import blockft
from blockft.bench.measurement import measurement_provenance

MODEL = "data/demo/model"
NUM_CHOOSING = 300
TEMPERATURES, SCALES = (0.2, 0.5, 0.7, 0.9, 1.0), (0.5, 0.7, 0.9, 1.0)
SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)
METHODS: list[dict[str, Any]] = [
    {"name": "mask"},
    {"name": "local-positions"},
    {"name": "shared-start", "start_tokens": 2},
    {"name": "shared-start"},
    *({"name": "recompute", "tokens": "first", "share": share} for share in SHARES),
    *({"name": "recompute", "tokens": "deviation", "share": share} for share in SHARES),
]
"""`ape` is added with the chosen temperature and scale."""


def ask(work: Path, file: str, mode: str, method: dict[str, Any] | None, limit: int | None = None) -> str:
    """Return the hits of the base model on a file of the world: a digit a question."""
    folder = work / "eval"
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [f"eval.sources.0.path={work}/{file}.jsonl", f"eval.output_dir={folder}"]
    overrides.append("eval.batch_size=64")
    overrides += [f"eval.method.{key}={value}" for key, value in (method or {}).items()]
    overrides += [f"eval.modes=[{mode}]"] + ([f"eval.max_samples={limit}"] if limit else [])
    blockft.evaluate(MODEL, blockft.load_recipe("demo", overrides))
    return read_hits(folder / f"predictions-{mode}.jsonl")


def run(work: Path, out: Path) -> None:
    if not (work / "train.jsonl").exists():
        command = [sys.executable, "data/demo/world.py", str(work), "--scenes", "1500"]
        subprocess.run(command, check=True)
    choosing = []
    for temperature in TEMPERATURES:
        for scale in SCALES:
            method = {"name": "ape", "temperature": temperature, "scale": scale}
            hits = ask(work, "train", "block", method, NUM_CHOOSING)
            choosing.append({"method": method, "hits": hits})
            print(method, hits.count("1"), flush=True)
    best = max(choosing, key=lambda line: line["hits"].count("1"))["method"]
    results = [{"mode": "full", "method": None, "hits": ask(work, "heldout", "full", None)}]
    for method in [*METHODS, best]:
        results.append({"mode": "block", "method": method, "hits": ask(work, "heldout", "block", method)})
        print(method, results[-1]["hits"].count("1"), flush=True)
    provenance = {key: value for key, value in measurement_provenance().items() if key != "command"}
    content = {"model": MODEL, "chosen on training questions": choosing, "results": results, **provenance}
    out.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_scores(path: Path) -> list[tuple[str, NDArray[np.float64]]]:
    """The label and the scores in percent of full mode and of every method."""
    found = []
    for line in json.loads(path.read_text(encoding="utf-8"))["results"]:
        method = line["method"] or {"name": "full attention"}
        options = ", ".join(f"{key} {value}" for key, value in method.items() if key != "name")
        label = f"`{method['name']}`" if line["method"] else method["name"]
        hits = np.array([100.0 * (c == "1") for c in line["hits"]])
        found.append((label + (f", {options}" if options else ""), hits))
    return found


def show(path: Path) -> str:
    rows = ["| method | substring match | minus the mask alone |", "|---|---|---|"]
    scores = read_scores(path)
    mask = next(hits for label, hits in scores if label == "`mask`")
    for label, hits in scores:
        cells = []
        for values, sign in ((hits, ""), (hits - mask, "+")):
            low, high = interval(resampled_mean({"all": values}))
            cells.append(f"{values.mean():{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]")
        rows.append(f"| {label} | {cells[0]} | {cells[1] if label != '`mask`' else ''} |")
    return "\n".join(rows)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", work, out]:
            run(Path(work).resolve(), Path(out))
        case ["show", out]:
            print(show(Path(out)))
        case _:
            sys.exit(__doc__)
