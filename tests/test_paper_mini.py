"""The script of the small table: what it asks of blockft, that it goes on, and the table that it ends in."""

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
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps(words), file=calls)
if os.environ.get("DIES_AT") in words[1:]:
    sys.exit(1)
keys = dict(word.split("=", 1) for word in words if "=" in word)
made = {{"prepare": "data.output_dir", "train": "train.output_dir", "eval": "eval.output_dir"}}
folder = Path(keys[made[words[0]]]) if words[0] in made else Path(words[2])
folder.mkdir(parents=True, exist_ok="--resume" in words)
if words[0] == "prepare":
    (folder / "manifest.json").touch()
if words[0] == "eval":
    sys.path.insert(0, {str(ROOT)!r})
    from tests.test_paper_mini import save_report
    save_report(folder, words[words.index("--modes") + 1].split(","))
if words[0] == "train":
    (folder / "recipe.yaml").write_text(open({str(ROOT / "recipes/smollm2-135m.yaml")!r}).read())
    (folder / "metrics.jsonl").write_text('{{"step": 160, "loss": 1.0, "tokens_per_s": 5.0}}\\n')
"""


def save_report(folder: Path, modes: list[str]) -> None:
    """Two sources of two questions; block mode fails one of them."""
    answered = {
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
    (folder / "report.json").write_text(json.dumps(build_report("m", answered, {})))
    for mode, some in answered.items():
        lines = "".join(json.dumps(p.to_record()) + "\n" for p in some)
        (folder / f"predictions-{mode}.jsonl").write_text(lines)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    for name, text in (("blockft", STAND_IN), ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "paper-mini").symlink_to(ROOT / "data" / "paper-mini")
    return tmp_path


def run(workplace: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    added = {"PATH": f"{workplace / 'bin'}:{os.environ['PATH']}", "CALLS": str(workplace / "calls")}
    added |= {"MODEL": "some/model", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        ["bash", SCRIPT, *words],
        cwd=workplace,
        capture_output=True,
        text=True,
        env=os.environ | added | environment,
    )


def calls(workplace: Path) -> list[list[str]]:
    return [json.loads(line) for line in (workplace / "calls").read_text().splitlines()]


def test_a_table_is_made_of_four_runs_and_five_evaluations(workplace: Path) -> None:
    done = run(workplace)
    assert done.returncode == 0, done.stderr
    asked = calls(workplace)
    verbs = [words[0] for words in asked]
    assert {verb: verbs.count(verb) for verb in verbs} == {"prepare": 1, "train": 4, "export": 4, "eval": 5}
    recipes = {}
    for words in (words for words in asked if words[0] == "train"):
        assert words[1] == "smollm2-135m"
        recipe = load_recipe(words[1], words[2:])
        recipes[Path(recipe.train.output_dir).parent.name] = recipe
    assert {name: (*r.data.modes, r.data.positions) for name, r in recipes.items()} == {
        "full": ("full", "reencoded"),
        "both": ("block", "full", "reencoded"),
        "local": ("block", "full", "local"),
        "block-only": ("block", "reencoded"),
    }
    # the runs differ in nothing else
    for recipe in recipes.values():
        recipe.data.modes, recipe.data.positions = [Mode.block], Positions.reencoded
        recipe.train.output_dir = "run"
    assert all(recipe == recipes["both"] for recipe in recipes.values())
    # what is asked is searched for and ordered as what was trained on
    asked_of = [
        load_recipe(words[2], words[3 : words.index("--modes")]) for words in asked if words[0] == "eval"
    ]
    assert {recipe.data.order for recipe in (*asked_of, *recipes.values())} == {"ascending"}
    assert {source.retriever for recipe in asked_of for source in recipe.eval.sources} == {"bm25"}
    assert {source.retriever for source in recipes["both"].data.sources[:5]} == {"bm25"}
    # no question that trained is asked
    trained = {source.path: source.max_samples for source in recipes["both"].data.sources}
    twice = [source for source in asked_of[0].eval.sources if source.path in trained]
    assert [source.format for source in twice] == ["2wikimultihopqa"]
    assert twice[0].skip_samples == trained[twice[0].path] and twice[0].max_samples == 200
    table = json.loads((workplace / "data/results/paper-mini.json").read_text())
    assert len(table["rows"]) == 8 and len(table["runs"]) == 4
    block = table["rows"]["block fine-tuned, block mode"]
    assert block["scores"]["all"]["substring_match"] == 75 and block["scores"]["squad"]["questions"] == 2
    assert block["difference to full fine-tuning"]["substring_match"] == -25
    assert "| full fine-tuned, block mask | 100.0" in (workplace / "data/results/paper-mini.md").read_text()
    assert (workplace / "data/results/paper-mini.png").stat().st_size > 0


def test_what_is_finished_is_skipped_and_what_is_not_goes_on(workplace: Path) -> None:
    assert run(workplace, "train.seed=3", DIES_AT="out/paper-mini/full/run").returncode == 1
    before = calls(workplace)
    assert before[-1][:2] == ["export", "out/paper-mini/full/run"]
    done = run(workplace, "train.seed=3")
    assert done.returncode == 0, done.stderr
    after = calls(workplace)[len(before) :]
    assert after[0][0] == "train" and after[0][-1] == "--resume" and "train.seed=3" in after[0]
    assert [words[0] for words in after].count("train") == 4
    assert run(workplace, "train.seed=3").returncode == 0 and len(calls(workplace)) == len(before) + len(
        after
    )
    # a try with overrides is no result
    assert (workplace / "out/paper-mini/paper-mini.json").is_file() and not (
        workplace / "data/results"
    ).exists()


def test_parts_of_different_tables_are_not_mixed(workplace: Path) -> None:
    assert run(workplace).returncode == 0
    done = run(workplace, "train.max_steps=5")
    assert done.returncode == 2 and "other settings" in done.stderr


def test_a_question_that_is_asked_twice_counts_twice(tmp_path: Path) -> None:
    table = runpy.run_path(str(ROOT / "data/paper-mini/table.py"))
    rows = {}
    for row, scores in {"block": (0, 1, 0), "full": (1, 1, 1)}.items():
        lines = [{"id": "same", "groups": ["fid"], "scores": {"substring_match": score}} for score in scores]
        (tmp_path / row).write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows[row] = table["_hits"](tmp_path / row)
    difference = table["_difference"](rows["block"], rows["full"])
    assert difference["substring_match"] == pytest.approx(-200 / 3)
