"""Constructed sets as sources: prompts of more than 300 blocks are prepared, trained and evaluated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from blockft.config.choices import Format, Order
from blockft.config.recipe import load_recipe
from blockft.config.settings import ConstructedSettings, Recipe, Source
from blockft.data.prepared import load_prepared
from blockft.data.sources import RecordCounts
from blockft.errors import UserError
from blockft.stages.evaluate import evaluate
from blockft.stages.export import export
from blockft.stages.prepare import prepare
from blockft.stages.source_settings import read_source, settings_without_effect
from tests.commands import logged, train
from tests.run import TEMPLATE

Make = Callable[..., Recipe]


def constructed(path: str, **settings: Any) -> Source:
    return Source(**{"format": Format.constructed, "path": path, "max_samples": 30} | settings)


def save_small_model(folder: Path, texts: list[str]) -> None:
    """Save a random model with a tokenizer that needs few tokens for `texts`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|system|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def test_prompts_of_more_than_300_blocks_are_trained_in_both_modes_and_evaluated(
    tmp_path: Path, make_recipe: Make
) -> None:
    source = constructed("many-blocks", constructed=ConstructedSettings(num_documents=310), max_samples=3)
    samples = list(read_source(source, make_recipe().data, RecordCounts()))
    save_small_model(tmp_path / "model", ["".join(sample.blocks) for sample in samples])
    path = tmp_path / "recipe.yaml"
    part = "{format: constructed, path: many-blocks, constructed: {num_documents: 310}"
    path.write_text(
        f"model: {{path: {tmp_path}/model}}\n"
        f"data:\n"
        f"  output_dir: {tmp_path}/data\n"
        f"  row_len: 8000\n"
        f"  num_workers: 1\n"
        f"  sources: [{part}, max_samples: 2}}]\n"
        f"train: {{output_dir: {tmp_path}/run, batch_rows: 2, learning_rate: 1e-2}}\n"
        f"eval:\n"
        f"  output_dir: {tmp_path}/eval\n"
        f"  max_new_tokens: 2\n"
        f"  sources: [{part}, skip_samples: 2, max_samples: 2}}]\n"
    )
    recipe = load_recipe(str(path))
    prepared = load_prepared(prepare(recipe))
    assert [len(example.block_lengths) for example in prepared.examples] == [313, 313]
    assert prepared.manifest["leaks"][0]["found"] == []
    train(path, tmp_path / "run")
    assert len(logged(tmp_path / "run")) == 1
    report = evaluate(str(export(tmp_path / "run", tmp_path / "export")), recipe)
    assert {*report["modes"]} == {"block", "full"}
    groups = {*report["modes"]["block"], *report["same questions"]}
    assert any("310 turns, " in group for group in groups)
    assert any("evidence in the " in group for group in groups)
    predictions = (tmp_path / "eval" / "predictions-block.jsonl").read_text().splitlines()
    assert [json.loads(line)["num_blocks"] for line in predictions] == [313, 313]


@pytest.mark.parametrize("name", ["related-passages", "many-blocks", "in-context"])
def test_training_and_evaluation_parts_share_no_sample(make_recipe: Make, name: str) -> None:
    size = ConstructedSettings(num_documents=24)
    data = make_recipe().data
    first, second = (
        list(read_source(constructed(name, skip_samples=skip, constructed=size), data, RecordCounts()))
        for skip in (0, 30)
    )
    assert [sample.id for sample in second] == [f"{name}-{number}" for number in range(30, 60)]
    assert not {s.blocks[-1] for s in first} & {s.blocks[-1] for s in second}
    again = list(read_source(constructed(name, skip_samples=29, max_samples=1), data, RecordCounts()))
    assert [sample.id for sample in again] == [first[-1].id]


def test_the_level_says_where_in_the_prompt_the_evidence_stands(make_recipe: Make) -> None:
    thirds = set()
    for order in Order:
        data = make_recipe(order=order).data
        for sample in read_source(constructed("many-blocks"), data, RecordCounts()):
            documents, supporting = sample.meta["documents"], sample.meta["supporting"]
            place = sum(map(documents.index, supporting)) / len(supporting) / len(documents)
            third = ("first", "middle", "last")[int(3 * place)]
            assert sample.meta["level"] == f"evidence in the {third} third"
            thirds.add(third)
    assert len(thirds) == 3


def test_the_number_of_documents_is_that_of_the_set(make_recipe: Make) -> None:
    recipe = make_recipe(num_documents=3, sources=[constructed("in-context")])
    samples = list(read_source(recipe.data.sources[0], recipe.data, RecordCounts()))
    assert {len(sample.documents) for sample in samples} == {32}
    assert any("data.num_documents has no effect" in line for line in settings_without_effect(recipe.data))
    with pytest.raises(UserError, match=r"or lower data\.sources\.0\.constructed\.num_documents$"):
        prepare(make_recipe(row_len=100, sources=[constructed("in-context")]))
    with pytest.raises(UserError, match="num_documents 9, which is too few"):
        prepare(
            make_recipe(
                sources=[
                    constructed("many-blocks", constructed=ConstructedSettings(num_documents=9)),
                ]
            )
        )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("format: constructed, path: in-context", "has no end: set max_samples"),
        ("format: fid, path: x.jsonl, constructed: {num_hops: 2}", "belongs to format: constructed"),
        ("format: constructed, path: in-context, max_samples: 1, retriever: bm25", "nor retriever"),
        (
            "format: constructed, path: in-context, max_samples: 1, constructed: {num_labels: 13}",
            "at most 12",
        ),
    ],
)
def test_settings_that_contradict_a_constructed_set_are_refused(
    tmp_path: Path, source: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: m}}\ndata: {{output_dir: d, sources: [{{{source}}}]}}\ntrain: {{output_dir: r}}\n"
    )
    with pytest.raises(UserError, match=message) as raised:
        load_recipe(str(path))
    assert "\n" not in str(raised.value)
