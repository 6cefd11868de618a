"""The script of the small table: the commands that it runs, how it resumes, and the table that it writes."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from blockft.config.choices import Mode, Positions
from blockft.config.recipe import load_recipe
from blockft.evaluation.report import Prediction, build_report
from tests.test_cli import ROOT

SCRIPT = "data/paper-mini/paper-mini.sh"

STAND_IN = f"""#!{sys.executable}
import json, os, shutil, sys
from pathlib import Path
command, *arguments = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([command, *arguments]), file=calls)
if os.environ.get("FAIL_AT") in arguments:
    sys.exit(1)
settings = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
outputs = {{"prepare": "data.output_dir", "train": "train.output_dir", "eval": "eval.output_dir"}}
folder = Path(settings[outputs[command]]) if command in outputs else Path(arguments[1])
folder.mkdir(parents=True, exist_ok="--resume" in arguments)
if command == "prepare":
    (folder / "manifest.json").touch()
if command == "eval":
    modes = arguments[arguments.index("--modes") + 1]
    shutil.copytree(Path("reports", modes), folder, dirs_exist_ok=True)
if command == "train":
    (folder / "recipe.yaml").write_text(open({str(ROOT / "data/paper-mini/recipe.yaml")!r}).read())
    (folder / "metrics.jsonl").write_text('{{"step": 160, "loss": 1.0, "tokens_per_s": 5.0}}\\n')
"""


def save_report(folder: Path, modes: list[str]) -> None:
    """Save an evaluation of two sources with two questions each; block mode fails one of them."""
    predictions = {
        mode: [
            Prediction(
                id=str(i % 2),
                answer="no" if mode == "block" and i == 3 else "yes",
                golds=("yes",),
                groups=(("squad", "squad: easy"), ("fid",))[i // 2],
                num_blocks=3,
                prompt_tokens=9,
                num_tokens=1,
                hit_token_limit=False,
            )
            for i in range(4)
        ]
        for mode in modes
    }
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(build_report("m", predictions, {})))
    for mode, of_mode in predictions.items():
        lines = "".join(json.dumps(prediction.to_record()) + "\n" for prediction in of_mode)
        (folder / f"predictions-{mode}.jsonl").write_text(lines)


def make_workplace(folder: Path) -> Path:
    """Make a folder to run the script in, with a stand-in for blockft that writes what the table needs."""
    (folder / "bin").mkdir()
    for name, text in (("blockft", STAND_IN), ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "data").mkdir()
    (folder / "data" / "paper-mini").symlink_to(ROOT / "data" / "paper-mini")
    for modes in ("full,block", "block"):
        save_report(folder / "reports" / modes, modes.split(","))
    return folder


def run(workplace: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    added = {"PATH": f"{workplace / 'bin'}:{os.environ['PATH']}", "CALLS": str(workplace / "calls")}
    added |= {"MODEL": "some/model", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        ["bash", SCRIPT, *overrides],
        cwd=workplace,
        capture_output=True,
        text=True,
        env=os.environ | added | environment,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace in which the script has run to its end."""
    workplace = make_workplace(tmp_path_factory.mktemp("finished"))
    done = run(workplace)
    assert done.returncode == 0, done.stderr
    return workplace


def calls(workplace: Path) -> list[list[str]]:
    return [json.loads(line) for line in (workplace / "calls").read_text().splitlines()]


def test_the_table_is_made_from_four_runs_and_five_evaluations(finished: Path) -> None:
    commands = calls(finished)
    names = [name for name, *_ in commands]
    assert {name: names.count(name) for name in names} == {"prepare": 1, "train": 4, "export": 4, "eval": 5}
    recipes = {}
    for name, recipe_name, *overrides in commands:
        if name != "train":
            continue
        assert recipe_name == "data/paper-mini/recipe.yaml"
        recipe = load_recipe(str(ROOT / recipe_name), overrides)
        recipes[Path(recipe.train.output_dir).parent.name] = recipe
    assert {name: (*r.data.modes, r.data.positions) for name, r in recipes.items()} == {
        "full": ("full", "reencoded"),
        "both": ("block", "full", "reencoded"),
        "local": ("block", "full", "local"),
        "block-only": ("block", "reencoded"),
    }
    # the runs differ in no other setting
    for recipe in recipes.values():
        recipe.data.modes, recipe.data.positions = [Mode.block], Positions.reencoded
        recipe.train.output_dir = "run"
    assert all(recipe == recipes["both"] for recipe in recipes.values())
    # documents are retrieved and ordered in evaluation as in training
    evaluations = [
        load_recipe(str(ROOT / command[2]), command[3 : command.index("--modes")])
        for command in commands
        if command[0] == "eval"
    ]
    assert {recipe.data.order for recipe in (*evaluations, *recipes.values())} == {"ascending"}
    assert {source.retriever for recipe in evaluations for source in recipe.eval.sources} == {"bm25"}
    assert {source.retriever for source in recipes["both"].data.sources[:5]} == {"bm25"}
    # no question of the evaluation was trained on
    trained = {source.path: source.max_samples for source in recipes["both"].data.sources}
    in_both = [source for source in evaluations[0].eval.sources if source.path in trained]
    assert [source.format for source in in_both] == ["2wikimultihopqa"]
    assert in_both[0].skip_samples == trained[in_both[0].path] and in_both[0].max_samples == 200
    table = json.loads((finished / "data/results/paper-mini.json").read_text())
    assert len(table["rows"]) == 8 and len(table["runs"]) == 4
    block = table["rows"]["block fine-tuned, block mode"]
    assert block["scores"]["all"]["substring_match"] == 75 and block["scores"]["squad"]["questions"] == 2
    assert block["difference to full fine-tuning"]["substring_match"] == -25
    assert "| full fine-tuned, block mask | 100.0" in (finished / "data/results/paper-mini.md").read_text()
    assert (finished / "data/results/paper-mini.png").stat().st_size > 0


def test_finished_parts_are_skipped_and_an_unfinished_one_resumes(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path)
    assert run(workplace, "train.seed=3", FAIL_AT="out/paper-mini/full/run").returncode == 1
    before = calls(workplace)
    assert before[-1][:2] == ["export", "out/paper-mini/full/run"]
    done = run(workplace, "train.seed=3")
    assert done.returncode == 0, done.stderr
    after = calls(workplace)[len(before) :]
    assert after[0][0] == "train" and after[0][-1] == "--resume" and "train.seed=3" in after[0]
    assert [name for name, *_ in after].count("train") == 4
    assert run(workplace, "train.seed=3").returncode == 0
    assert len(calls(workplace)) == len(before) + len(after)
    # with overrides the table is not written among the results
    assert (workplace / "out/paper-mini/paper-mini.json").is_file()
    assert not (workplace / "data/results").exists()


def test_parts_with_other_settings_are_refused(finished: Path) -> None:
    done = run(finished, "train.max_steps=5")
    assert done.returncode == 2 and "other settings" in done.stderr


def test_a_question_that_occurs_twice_counts_twice(tmp_path: Path) -> None:
    table = runpy.run_path(str(ROOT / "data/paper-mini/table.py"))
    rows = {}
    for row, scores in {"block": (0, 1, 0), "full": (1, 1, 1)}.items():
        lines = [{"id": "same", "groups": ["fid"], "scores": {"substring_match": score}} for score in scores]
        (tmp_path / row).write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows[row] = table["_hits"](tmp_path / row)
    difference = table["_difference"](rows["block"], rows["full"])
    assert difference["substring_match"] == pytest.approx(-200 / 3)
