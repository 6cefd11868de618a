"""Every shipped recipe prepares and reads its questions as it stands, from stand-ins for its datasets.

The stand-ins have the columns of the published datasets. Only the loading of a Hub id is replaced, by the
same loader on a local file.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from blockft.config.choices import Format
from blockft.config.recipe import list_recipes, load_recipe
from blockft.config.settings import Source
from blockft.data.prepared import load_prepared
from blockft.stages.evaluate import read_questions
from blockft.stages.prepare import prepare
from tests.commands import ROOT
from tests.data.test_retrieval import Letters
from tests.endpoint import Reply, completion, endpoint

NUM_RECORDS = 12


def hotpotqa(i: int) -> dict[str, Any]:
    titles = [f"Town {n}" for n in range(10)]
    return {
        "id": f"h{i}",
        "question": f"What grows in town {i % 10}?",
        "answer": f"apple {i % 10}",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": {"title": [titles[i % 10]], "sent_id": [0]},
        "context": {
            "title": titles,
            "sentences": [[f"Apple {n} grows in town {n}.", " It is old."] for n in range(10)],
        },
    }


def two_wiki(i: int) -> dict[str, Any]:
    record = hotpotqa(i) | {"id": f"w{i}", "evidences": [["Town", "plant", "apple"]]}
    del record["level"]
    return record


def musique(i: int) -> dict[str, Any]:
    paragraphs = [
        {
            "idx": n,
            "title": f"River {n}",
            "paragraph_text": f"River {n} is {n} km long.",
            "is_supporting": n == i,
        }
        for n in range(20)
    ]
    return {
        "id": f"2hop__{i}_{i}",
        "paragraphs": paragraphs,
        "question": f"How long is river {i}?",
        "question_decomposition": [
            {"id": i, "question": "river >> length", "answer": f"{i} km", "paragraph_support_idx": i}
        ],
        "answer": f"{i} km",
        "answer_aliases": [],
        "answerable": True,
    }


def squad(i: int) -> dict[str, Any]:
    return {
        "id": f"s{i}",
        "title": "Bridges",
        "context": f"Bridge number {i} was built from stone{i}.",
        "question": f"From what was bridge {i} built?",
        "answers": {"text": [f"stone{i}"], "answer_start": [28]},
    }


def tulu(i: int) -> dict[str, Any]:
    turns = [("user", f"Tell me about number {i}.\n\nPlease be short."), ("assistant", f"{i} is a number.")]
    messages = [{"content": content, "role": role} for role, content in turns]
    return {"id": f"t{i}", "messages": messages, "source": "made up"}


def fid(i: int) -> dict[str, Any]:
    documents = [{"title": f"Cat {n}", "text": f"Cat {n} likes fish {n}."} for n in range(3)]
    return {"question": f"What does cat {i % 3} like?", "answers": [f"fish {i % 3}"], "ctxs": documents}


def sample(i: int) -> dict[str, Any]:
    content = ["Answer.", f"\n\nx is {i}.", "\n\nWhat is x?"]
    message = {"role": "user", "content": content}
    meta = {"documents": [1]}
    record = {"id": f"q{i}", "source": "made up", "messages": [message], "response": f"{i}"}
    return record | {"answers": [f"{i}"], "meta": meta}


HUB = {
    ("hotpotqa/hotpot_qa", "distractor"): (hotpotqa, {"train", "validation"}),
    ("framolfese/2WikiMultihopQA", None): (two_wiki, {"train", "validation"}),
    ("dgslibisey/MuSiQue", None): (musique, {"train", "validation"}),
    ("rajpurkar/squad", None): (squad, {"train", "validation"}),
    ("allenai/tulu-3-sft-mixture", None): (tulu, {"train"}),
}
"""The Hub datasets of the recipes: (id, configuration) -> records like theirs, and the splits they have."""

LOCAL = {"messages": tulu, "fid": fid, "samples": sample}


def write_local(source: Source) -> None:
    """Write records of the source's format to its path."""
    path = Path(source.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [LOCAL[source.format.value](i) for i in range(NUM_RECORDS)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.mark.parametrize("name", list_recipes())
def test_a_shipped_recipe_prepares_and_reads_its_questions(
    name: str, tmp_path: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_dataset = datasets.load_dataset

    def load_stand_in(path: str, name: str | None, *, split: str, streaming: bool) -> Any:
        make, splits = HUB[path, name]
        assert streaming and split in splits
        file = tmp_path / f"{path.replace('/', '-')}.parquet"
        datasets.Dataset.from_list([make(i) for i in range(NUM_RECORDS)]).to_parquet(file)
        files = {split: str(file)}
        return load_dataset("parquet", data_files=files, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_stand_in)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name, [f"model.path={toy_model}", "data.num_workers=1"])
    assert recipe.eval
    for source in (*recipe.data.sources, *recipe.eval.sources):
        if source.format is Format.constructed:
            source.max_samples = NUM_RECORDS
        elif source.split is None:
            write_local(source)
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Letters))
    with endpoint(lambda text, before: Reply(body=completion("An answer."))) as server:
        if recipe.data.teacher:
            recipe.data.teacher.base_url = server.base_url
        manifest = load_prepared(prepare(recipe)).manifest
    assert [source["read"] for source in manifest["sources"]] == [NUM_RECORDS] * len(recipe.data.sources)
    assert all(source["kept"] == NUM_RECORDS for source in manifest["sources"])
    questions, dropped = read_questions(recipe)
    assert len(questions) == NUM_RECORDS * len(recipe.eval.sources) and not dropped


def test_the_recipe_of_the_readme_is_the_shipped_one_for_own_data(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block, encoding="utf-8")
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe("own-data")
    shipped = list_recipes()["own-data"].read_text(encoding="utf-8")
    commands = re.findall(r"^#   (blockft .+)$", shipped, flags=re.MULTILINE)
    assert len(commands) == 4 and all(f"\n{command} " in readme for command in commands)


PLAIN = {"constructed", "demo", "demo-base", "llama-3.1-8b-paper"}
"""Recipes whose documents see themselves alone."""


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_for_training_lets_documents_see_the_instruction_or_says_why_not(name: str) -> None:
    assert load_recipe(name).data.local_sees_first == (name not in PLAIN)
    comments = [line for line in list_recipes()[name].read_text(encoding="utf-8").splitlines() if "#" in line]
    assert name not in PLAIN or any("local_sees_first" in line for line in comments)
