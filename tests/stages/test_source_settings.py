import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from blockft.config.choices import Format, Order, Retriever, Role
from blockft.config.recipe import load_recipe
from blockft.config.settings import DataSettings, PromptSettings, Source
from blockft.data.sample import Sample
from blockft.data.sources import SOURCE_FORMATS, RecordCounts
from blockft.errors import UserError
from blockft.stages.source_settings import check_wording, rag_prompt, read_source, settings_without_effect
from tests.commands import ROOT

REAL_DATA = Path(os.environ.get("BLOCKFT_REAL_DATA", "../shared/data"))
COUNTS = {
    "squadshifts_new_wiki_train.json": 6558,
    "nq_open_oracle_train.jsonl": 2000,
    "hotpotqa_distractor_train.json": 100,
    "2wikimultihopqa_train.json": 300 + 150,
    "musique_train.jsonl": 100,
    "instructions_t0.jsonl": 4000,
    "squadshifts_new_wiki_dev.json": 150,
    "nq_open_oracle_dev.jsonl": 150,
    "hotpotqa_distractor_dev.json": 150,
}
"""Records in the sources of the recipe: every one gives a sample."""


SOURCE = Source(format=Format.samples, path="samples.jsonl")


def settings(**changes: Any) -> DataSettings:
    return DataSettings(**{"output_dir": "out", "sources": [SOURCE]} | changes)


@pytest.mark.parametrize(
    ("wording", "message"),
    [
        ({"instruction": " \n"}, "data.prompt.instruction is blank"),
        ({"document": "{title}\n{text}\n\n"}, r"data.prompt.document ends in '\\n\\n'"),
        ({"document": "{txt}"}, "{txt}"),
    ],
)
def test_a_wording_that_would_change_documents_is_refused(wording: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        check_wording(PromptSettings(**wording))
        rag_prompt(settings(prompt=PromptSettings(**wording)))
    assert "\n" not in str(raised.value)


def test_unknown_columns_are_an_error_without_remarks_on_other_settings() -> None:
    source = Source(format=Format.columns, path="q.jsonl", corpus="c.jsonl", retriever=Retriever.bm25)
    assert settings_without_effect(settings(sources=[source], num_documents=5, order=Order.given)) == []


def real_samples(source: Source, data: DataSettings) -> tuple[list[Sample], RecordCounts]:
    if not Path(source.path).exists():
        pytest.skip(f"{source.path} is not there (set BLOCKFT_REAL_DATA)")
    counts = RecordCounts()
    return list(read_source(source, data, counts)), counts


@pytest.mark.real_data
def test_the_recipe_of_the_small_table_reads_every_record_of_the_real_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BLOCKFT_REAL_DATA", str(REAL_DATA))
    recipe = load_recipe(str(ROOT / "data/paper-mini/recipe.yaml"))
    assert recipe.eval
    ids: dict[str, list[str]] = {}
    for source in (*recipe.data.sources, *recipe.eval.sources):
        samples, counts = real_samples(source, recipe.data)
        assert counts.read == counts.samples == len(samples) and not counts.dropped
        ids.setdefault(Path(source.path).name, []).extend(sample.id for sample in samples)
        if SOURCE_FORMATS[source.format].parse_question:
            assert all(sample.meta["supporting"] for sample in samples)
            num_documents = Counter(len(sample.documents) for sample in samples)
            assert max(num_documents) == 10 and num_documents[10] > 0.95 * len(samples)
    assert {name: len(some) for name, some in ids.items()} == COUNTS
    assert all(len(set(some)) == len(some) for some in ids.values())


@pytest.mark.real_data
@pytest.mark.parametrize("shared_context", [False, True])
def test_no_distractor_of_squad_holds_an_answer(shared_context: bool) -> None:
    source = Source(format=Format.squad, path=str(REAL_DATA / "squadshifts_new_wiki_dev.json"))
    samples, counts = real_samples(source, settings(shared_context=shared_context, num_documents=10))
    # in a quarter of the questions another paragraph of the article holds an answer
    assert counts.dropped.total() > 0 if shared_context else not counts.dropped
    assert counts.read == counts.samples + counts.dropped.total()
    for sample in samples:
        (gold,) = sample.meta["supporting"]
        texts = [" ".join(block.casefold().split()) for block in sample.blocks]
        answers = [" ".join(answer.casefold().split()) for answer in sample.answers]
        assert any(answer in texts[gold] for answer in answers)
        for document in set(sample.documents) - {gold}:
            paragraph = texts[document].partition(" ")[2]
            assert not any(answer in paragraph for answer in answers)


@pytest.mark.real_data
def test_the_same_document_is_the_same_block_in_every_prompt() -> None:
    source = Source(
        format=Format.fid,
        path=str(REAL_DATA / "nq_open_oracle_dev.jsonl"),
        retriever=Retriever.bm25,
        max_samples=60,
    )
    blocks_of: dict[tuple[Order, Role, int], list[set[str]]] = {}
    for order in Order:
        for role in Role:
            data = settings(order=order, num_documents=5, prompt=PromptSettings(documents_in=role))
            samples, _ = real_samples(source, data)
            blocks_of[order, role, 5] = [{s.blocks[d] for d in s.documents} for s in samples]
            assert all(m.text == m.text.strip() for s in samples for m in s.messages)
    assert len({tuple(map(frozenset, blocks)) for blocks in blocks_of.values()}) == 1
