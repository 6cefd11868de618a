"""The recipe of the paper's training set runs whole, from stand-ins with the columns of its public sets."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from blockft.config.recipe import dump_recipe, load_recipe
from blockft.data.prepared import load_prepared
from blockft.stages.evaluate import evaluate
from blockft.stages.export import export
from blockft.stages.prepare import prepare
from tests.commands import logged, train
from tests.data.test_retrieval import Letters
from tests.endpoint import Reply, Server, completion, endpoint
from tests.run import save_model
from tests.stages.test_prepare import samples_of
from tests.stages.test_shipped_recipes import hotpotqa, two_wiki

NUM_QUESTIONS = 8


def fid(i: int, lake: str) -> dict[str, Any]:
    """A record as FiD's script writes it: a hundred passages with scores."""
    passages = [
        {
            "id": str(n),
            "title": f"Cat {n}",
            "text": f"Cat {n} likes fish {n} of lake {lake}.",
            "score": f"{99 - n / 2:.2f}",
        }
        for n in range(100)
    ]
    return {
        "question": f"What does cat {i} like, number {i}?",
        "answers": [f"fish {i}", f"Fish {i}"],
        "target": f"Fish {i}",
        "ctxs": passages,
    }


def tulu(i: int) -> dict[str, Any]:
    """A chat that splits if `i` is even."""
    question = f"Tell me about number {i}." + "\n\nPlease be as short as you can be." * (i % 2 == 0)
    turns = [("user", question), ("assistant", f"{i} is a number.")]
    return {
        "id": f"t{i}",
        "messages": [{"content": content, "role": role} for role, content in turns],
        "source": "made up",
    }


def write_stand_ins(folder: Path) -> list[str]:
    """Write the sets of the recipe as their owners publish them; return the overrides of their paths."""
    for name, make in (("2wiki", two_wiki), ("hotpotqa", hotpotqa), ("tulu", tulu)):
        records = [make(i) for i in range(NUM_QUESTIONS)]
        datasets.Dataset.from_list(records).to_parquet(folder / name / "train-00000-of-00001.parquet")
    for name, first in (("TQA-train", 0), ("NQ-test", 20), ("TQA-test", 40)):
        records = [fid(first + i, lake=name) for i in range(NUM_QUESTIONS)]
        (folder / f"{name}.json").write_text(json.dumps(records))
    return [
        f"data.sources.0.path={folder}/2wiki",
        f"data.sources.1.path={folder}/TQA-train.json",
        f"data.sources.2.path={folder}/tulu",
        f"eval.sources.0.path={folder}/2wiki",
        f"eval.sources.1.path={folder}/hotpotqa",
        f"eval.sources.2.path={folder}/NQ-test.json",
        f"eval.sources.3.path={folder}/TQA-test.json",
    ]


def answer(text: str, before: int) -> Reply:
    (number,) = re.findall(r"(?:town|number) (\d+)\?", text)
    return Reply(body=completion(f"The documents say: {number}."))


def check_prepared(folder: Path, server: Server) -> None:
    manifest = load_prepared(folder).manifest
    assert [source["kept"] for source in manifest["sources"]] == [8, 8, 4]
    assert manifest["sources"][2]["dropped"] == {"does not split into blocks": 4}
    assert server.asked.total() == 2 * NUM_QUESTIONS and set(server.asked.values()) == {1}
    samples = samples_of(folder)
    by_source = Counter(sample.source for sample in samples)
    assert by_source == {"2wikimultihopqa": 8, "fid": 8, "made up": 4}
    for sample in samples[: 2 * NUM_QUESTIONS]:
        assert sample.response.startswith("The documents say") and len(sample.documents) == 10
        relevance = sample.meta["relevance"]
        assert relevance == sorted(relevance, reverse=True)
    # FiD ranks a hundred passages by score: the first ten are taken
    assert [samples[8].blocks[i].split("\n")[2] for i in samples[8].documents][:2] == [
        "- Title: Cat 0",
        "- Title: Cat 1",
    ]
    leaks = [[leak["questions"] for leak in entry["found"]] for entry in manifest["leaks"]]
    assert leaks == [[8], [8], [], []], "the stand-ins of 2Wiki and HotpotQA have the same questions"


def test_the_recipe_of_the_paper_runs_from_the_data_to_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Letters))
    save_model(tmp_path / "model")
    overrides = [
        *write_stand_ins(tmp_path),
        f"model.path={tmp_path}/model",
        f"data.output_dir={tmp_path}/data",
        "data.row_len=2048",
        "data.num_workers=1",
        "train.deepspeed=zero1",
        f"train.output_dir={tmp_path}/run",
        "train.batch_rows=4",
        "train.num_eval_examples=2",
        "train.max_steps=3",
        f"eval.output_dir={tmp_path}/eval",
        "eval.max_new_tokens=20",
    ]
    with endpoint(answer) as server:
        recipe = load_recipe("llama-3.1-8b-paper", [*overrides, f"data.teacher.base_url={server.base_url}"])
        check_prepared(prepare(recipe), server)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    train(path, tmp_path / "run")
    assert len(logged(tmp_path / "run")) == 3
    report = evaluate(export(tmp_path / "run", tmp_path / "export"), recipe)
    for mode in ("block", "full"):
        assert report["modes"][mode]["all"]["questions"] == 4 * NUM_QUESTIONS
    assert report["options"]["order of documents"] == "descending"
    assert report["options"]["documents per prompt"] == {"10": 4 * NUM_QUESTIONS}
