"""The second world of the study: the demo's model and names, three difficulties, three recipes, three seeds.

python data/results/gap/code/demo_world.py run WORK OUT [--only NAME] [--steps N]   trains and evaluates
python data/results/gap/code/demo_world.py show OUT                                 prints the table

`run` goes on where it was stopped: a model that has a file in OUT is not trained again. Unlike the other
scripts of this folder it uses the package as it is, not commit 53ce5e5. Run it in the root folder of the
project; WORK is a folder for worlds and models. A file of OUT holds the settings, the losses and the hits per
question, in the order of the questions of the world.

A scene has some towns with a mayor and a river each, one fact a document, in random order. A question of one
hop asks for the mayor or the river of a town. A question of two hops asks for the river of a mayor's town, or
for the mayor of a river's town, without naming the town: two documents are needed, and neither says that it is
needed without the other.
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


@dataclass(frozen=True, kw_only=True)
class Level:
    """A difficulty. `row_len` fits one scene and not two; `row_len_with_copies` does so for `first-block`."""

    num_towns: int
    hops: tuple[int, ...]
    steps: int
    num_heldout: int
    row_len: int
    row_len_with_copies: int


LEVELS = {
    "one-hop-8": Level(
        num_towns=4, hops=(1,), steps=100, num_heldout=100, row_len=128, row_len_with_copies=192
    ),
    "two-hops-6": Level(
        num_towns=3, hops=(1, 2), steps=300, num_heldout=100, row_len=144, row_len_with_copies=192
    ),
    "two-hops-10": Level(
        num_towns=5, hops=(1, 2), steps=300, num_heldout=60, row_len=224, row_len_with_copies=304
    ),
}
RECIPES = {
    "full": ["data.modes=[full]"],
    "both": ["data.modes=[full,block]"],
    "first-block": ["data.modes=[full,block]", "data.local_sees_first=true"],
}


def scene(rng: random.Random, level: Level) -> tuple[list[str], list[world.Question]]:
    """The documents of a scene and its questions, two a town for each number of hops."""
    towns, mayors, rivers = (
        rng.sample(world.NAMES[kind], level.num_towns) for kind in ("town", "mayor", "river")
    )
    documents, questions = [], []
    for town, mayor, river in zip(towns, mayors, rivers, strict=True):
        documents += [f"The mayor of {town} is {mayor}.\n", f"The river of {town} is {river}.\n"]
        asked = {1: ((town, "mayor", mayor), (town, "river", river))}
        asked[2] = ((river, "mayor", mayor), (mayor, "river", river))
        for hops in level.hops:
            questions += [
                world.Question(f"What is the {attribute} of {name}?", answer, answer)
                for name, attribute, answer in asked[hops]
            ]
    return documents, questions


def hops_of(question: str) -> int:
    """The documents that a question needs: one if it names a town."""
    return 1 if question.split()[-1].rstrip("?") in world.NAMES["town"] else 2


def write_world(folder: Path, level: Level) -> None:
    """The scenes of a difficulty: held-out ones, and as many for training as the steps of a run take."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[frozenset[str]] = set()
    num_train = SCENES_PER_STEP * level.steps
    for name, num_scenes in (("heldout", level.num_heldout), ("train", num_train)):
        world.write(folder / f"{name}.jsonl", num_scenes, 0, lambda rng: scene(rng, level), seen)


def settings(work: Path, level_name: str, recipe: str, seed: int, steps: int | None) -> list[str]:
    level, name = LEVELS[level_name], f"{level_name}-{recipe}"
    row_len = level.row_len_with_copies if recipe == "first-block" else level.row_len
    return [
        f"data.sources.0.path={work}/{level_name}/train.jsonl",
        f"data.output_dir={work}/{name}-data",
        f"data.row_len={row_len}",
        *RECIPES[recipe],
        f"train.output_dir={work}/{name}-seed{seed}-run",
        f"train.seed={seed}",
        f"train.max_steps={steps or level.steps}",
        f"train.batch_rows={SCENES_PER_STEP}",
        f"eval.sources.0.path={work}/{level_name}/heldout.jsonl",
        f"eval.output_dir={work}/{name}-seed{seed}-eval",
        "eval.batch_size=64",
    ]


def run_one(work: Path, level_name: str, recipe: str, seed: int, steps: int | None) -> dict[str, Any]:
    """Train and evaluate one model; the losses and the hits of every question."""
    overrides = settings(work, level_name, recipe, seed, steps)
    loaded = blockft.load_recipe("demo", overrides)
    data, run, evaluation = (
        Path(p) for p in (loaded.data.output_dir, loaded.train.output_dir, loaded.eval.output_dir)
    )
    model = run.with_name(run.name.replace("-run", "-model"))
    if not data.exists():
        blockft.prepare(loaded)
    for folder in (run, model, evaluation):
        shutil.rmtree(folder, ignore_errors=True)
    start = time.monotonic()
    blockft.train(loaded)
    trained = time.monotonic()
    blockft.export(run, model)
    blockft.evaluate(model, loaded)
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    return {
        "level": level_name,
        "recipe": recipe,
        "seed": seed,
        "settings": [s for s in overrides if str(work) not in s],
        "losses": losses,
        "seconds": {"train": round(trained - start, 1), "rest": round(time.monotonic() - trained, 1)},
        "hits": {mode: read_hits(evaluation / f"predictions-{mode}.jsonl") for mode in ("full", "block")},
        **{k: v for k, v in measurement_provenance().items() if k != "command"},
    }


def read_hits(predictions: Path) -> str:
    lines = map(json.loads, predictions.read_text(encoding="utf-8").splitlines())
    return "".join(str(int(line["scores"]["substring_match"])) for line in lines)


def run(work: Path, out: Path, only: str, steps: int | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    # the first seeds of all recipes come first, so that a stopped run can be compared
    for seed in SEEDS:
        for level_name, level in LEVELS.items():
            if not (work / level_name / "train.jsonl").exists():
                write_world(work / level_name, level)
            for recipe in RECIPES:
                name = f"{level_name}-{recipe}-seed{seed}"
                if (out / f"{name}.json").exists() or only not in name:
                    continue
                result = run_one(work, level_name, recipe, seed, steps)
                text = (work / level_name / "heldout.jsonl").read_text(encoding="utf-8")
                asked = [json.loads(line)["messages"][0]["content"][-1] for line in text.splitlines()]
                result["hops"] = "".join(str(hops_of(question)) for question in asked)
                (out / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
                print(name, {m: round(hits.count("1") / len(hits), 3) for m, hits in result["hits"].items()})


def show(out: Path) -> str:
    """The table: each recipe against `full` in full mode, seeds and questions drawn again."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*-seed*.json"))]

    def hits(level: str, recipe: str, mode: str, hops: int) -> np.ndarray[Any, Any]:
        found = [r for r in results if (r["level"], r["recipe"]) == (level, recipe)]
        chosen = np.array([h == str(hops) for h in found[0]["hops"]])
        rows = [[100.0 * (c == "1") for c in r["hits"][mode]] for r in sorted(found, key=lambda r: r["seed"])]
        return np.array(rows)[:, chosen]

    rows = ["| world | hops | questions | recipe, mode | score | seeds | minus `full` |", "|---" * 7 + "|"]
    for level_name, level in LEVELS.items():
        for hops in level.hops:
            full = hits(level_name, "full", "full", hops)
            for recipe in RECIPES:
                for mode in ("full", "block"):
                    own = hits(level_name, recipe, mode, hops)
                    difference = own - full
                    low, high = interval(resampled_mean({"all": difference}))
                    cells = [level_name, str(hops), str(own.shape[1]), f"`{recipe}`, {mode} mode"]
                    cells += [f"{own.mean():.1f}", ", ".join(f"{m:.1f}" for m in own.mean(axis=1))]
                    is_reference = recipe == "full" and mode == "full"
                    cells.append(
                        "" if is_reference else f"{difference.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
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
    running.add_argument("--steps", type=int, help="fewer steps, for a try")
    commands.add_parser("show").add_argument("out", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        run(options.work.resolve(), options.out, options.only, options.steps)
    else:
        print(show(options.out))


if __name__ == "__main__":
    main()
