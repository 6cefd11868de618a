"""The second world of the study: the demo's model and world, three difficulties, three recipes, three seeds.

python data/results/gap/code/demo_world.py run WORK OUT [--only NAME]   trains and evaluates
python data/results/gap/code/demo_world.py show OUT                     prints the table

`run` goes on where it was stopped: a model that has a file in OUT is not trained again. Unlike the other
scripts of this folder it uses the package as it is, not commit 53ce5e5. Run it in the root folder of the
project; WORK is a folder for worlds and models. A file of OUT holds the settings, the losses and, after
`EARLY_STEPS` steps and at the end, the hits per question in the order of the questions of the world.
"""

import argparse
import json
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import blockft
from blockft.bench.measurement import measurement_provenance
from blockft.run_folder import read_metrics
from scores import interval, resampled_mean

sys.path.insert(0, str(Path(__file__).parents[3] / "demo"))
import world  # noqa: E402

SEEDS = (0, 1, 2)
SCENES_PER_STEP = 8
EARLY_STEPS, NUM_STEPS = 30, 80


@dataclass(frozen=True, kw_only=True)
class Level:
    """A difficulty. `row_len` fits one scene and not two; `row_len_with_copies` does so for `first-block`."""

    num_towns: int
    num_heldout: int
    row_len: int
    row_len_with_copies: int


LEVELS = {
    "8 documents": Level(num_towns=4, num_heldout=80, row_len=128, row_len_with_copies=192),
    "16 documents": Level(num_towns=8, num_heldout=40, row_len=224, row_len_with_copies=320),
    "32 documents": Level(num_towns=16, num_heldout=20, row_len=424, row_len_with_copies=616),
}
RECIPES = {
    "full": ["data.modes=[full]"],
    "both": ["data.modes=[full,block]"],
    "first-block": ["data.modes=[full,block]", "data.local_sees_first=true"],
}


def write_world(folder: Path, level: Level) -> None:
    """The scenes of a difficulty: held-out ones, and as many for training as the steps of a run take."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[frozenset[str]] = set()
    num_train = SCENES_PER_STEP * NUM_STEPS

    def scene(rng: random.Random) -> tuple[list[str], list[world.Question]]:
        return world.scene(rng, level.num_towns, world.ATTRIBUTES, sentences=False)

    for name, num_scenes in (("heldout", level.num_heldout), ("train", num_train)):
        world.write(folder / f"{name}.jsonl", num_scenes, 0, scene, seen)


def file_name(level_name: str, recipe: str, seed: int) -> str:
    return f"{level_name.replace(' ', '-')}-{recipe}-seed{seed}"


def settings(work: Path, level_name: str, recipe: str, seed: int) -> list[str]:
    level, name = LEVELS[level_name], file_name(level_name, recipe, seed)
    row_len = level.row_len_with_copies if recipe == "first-block" else level.row_len
    return [
        f"data.sources.0.path={work}/{level.num_towns}/train.jsonl",
        f"data.output_dir={work}/{level.num_towns}-{recipe}-data",
        f"data.row_len={row_len}",
        *RECIPES[recipe],
        f"train.output_dir={work}/{name}-run",
        f"train.seed={seed}",
        f"train.max_steps={NUM_STEPS}",
        f"train.save_steps={EARLY_STEPS}",
        "train.save_total_limit=3",
        f"train.batch_rows={SCENES_PER_STEP}",
        f"eval.sources.0.path={work}/{level.num_towns}/heldout.jsonl",
        f"eval.output_dir={work}/{name}-eval",
        "eval.batch_size=64",
    ]


def run_one(work: Path, level_name: str, recipe: str, seed: int) -> dict[str, Any]:
    """Train one model and evaluate it twice; the losses and the hits of every question."""
    overrides = settings(work, level_name, recipe, seed)
    loaded = blockft.load_recipe("demo", overrides)
    data, run, evaluation = (
        Path(p) for p in (loaded.data.output_dir, loaded.train.output_dir, loaded.eval.output_dir)
    )
    if not data.exists():
        blockft.prepare(loaded)
    shutil.rmtree(run, ignore_errors=True)
    start = time.monotonic()
    blockft.train(loaded)
    trained = time.monotonic()
    hits: dict[str, dict[str, str]] = {}
    for step in (EARLY_STEPS, NUM_STEPS):
        model = work / "model"
        for folder in (model, evaluation):
            shutil.rmtree(folder, ignore_errors=True)
        blockft.export(run / f"checkpoint-{step}", model)
        blockft.evaluate(model, loaded)
        hits[str(step)] = {
            mode: read_hits(evaluation / f"predictions-{mode}.jsonl") for mode in ("full", "block")
        }
    return {
        "level": level_name,
        "recipe": recipe,
        "seed": seed,
        "settings": [s for s in overrides if str(work) not in s],
        "losses": [line["loss"] for line in read_metrics(run) if "loss" in line],
        "seconds": {"train": round(trained - start, 1), "rest": round(time.monotonic() - trained, 1)},
        "hits": hits,
        **{k: v for k, v in measurement_provenance().items() if k != "command"},
    }


def read_hits(predictions: Path) -> str:
    lines = map(json.loads, predictions.read_text(encoding="utf-8").splitlines())
    return "".join(str(int(line["scores"]["substring_match"])) for line in lines)


def run(work: Path, out: Path, only: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    # the first seeds of all recipes come first, so that a stopped run can be compared
    for seed in SEEDS:
        for level_name, level in LEVELS.items():
            folder = work / str(level.num_towns)
            if not (folder / "train.jsonl").exists():
                write_world(folder, level)
            for recipe in RECIPES:
                name = file_name(level_name, recipe, seed)
                if (out / f"{name}.json").exists() or only not in name:
                    continue
                result = run_one(work, level_name, recipe, seed)
                (out / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
                for step, of_mode in result["hits"].items():
                    print(name, step, {m: f"{h.count('1') / len(h):.3f}" for m, h in of_mode.items()})


def show(out: Path) -> str:
    """The table: each recipe against `full` in full mode, seeds and questions drawn again."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*-seed*.json"))]

    def hits(level: str, recipe: str, step: int, mode: str) -> np.ndarray[Any, Any]:
        found = [r for r in results if (r["level"], r["recipe"]) == (level, recipe)]
        found.sort(key=lambda result: result["seed"])
        return np.array([[100.0 * (c == "1") for c in r["hits"][str(step)][mode]] for r in found])

    def score(values: np.ndarray[Any, Any]) -> str:
        return f"{values.mean():.1f} ({', '.join(f'{mean:.1f}' for mean in values.mean(axis=1))})"

    steps = (EARLY_STEPS, NUM_STEPS)
    head = " | ".join(f"after {step} steps (seeds) | minus `full`" for step in steps)
    rows = [f"| world | recipe, mode | {head} |", "|---" * 6 + "|"]
    for level in LEVELS:
        for recipe in RECIPES:
            for mode in ("full", "block"):
                cells = [level, f"`{recipe}`, {mode} mode"]
                for step in steps:
                    own, full = hits(level, recipe, step, mode), hits(level, "full", step, "full")
                    low, high = interval(resampled_mean({"all": own - full}))
                    is_reference = recipe == "full" and mode == "full"
                    cells.append(score(own))
                    cells.append(
                        "" if is_reference else f"{(own - full).mean():+.1f} [{low:+.1f}, {high:+.1f}]"
                    )
                rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("work", type=Path)
    running.add_argument("out", type=Path)
    running.add_argument("--only", default="", help="run the models whose name holds this text")
    commands.add_parser("show").add_argument("out", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        run(options.work.resolve(), options.out, options.only)
    else:
        print(show(options.out))


if __name__ == "__main__":
    main()
