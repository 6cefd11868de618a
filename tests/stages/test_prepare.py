"""`blockft prepare`: the prepared folder, its reproducible bytes, counts of records, and refusals."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from blockft.config.choices import BadRecordPolicy, Format, Order, Retriever, TooLongPolicy
from blockft.config.settings import ModelSettings, PromptSettings, Recipe, Source, SplittingSettings
from blockft.data import sample_frames
from blockft.data.chat_template import TemplateMismatch
from blockft.data.encoder import IGNORE_INDEX, Encoder
from blockft.data.prepared import load_prepared
from blockft.data.sample import parse_sample
from blockft.errors import UserError
from blockft.stages.inspect import inspect
from blockft.stages.prepare import prepare
from blockft.stages.prepare_summary import print_summary
from tests.data.test_squad import article
from tests.data.toys import CHATML

Make = Callable[..., Recipe]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples_of(folder: Path) -> list[Any]:
    lines = (line for path in sorted(folder.glob("samples-*.jsonl")) for line in path.open(encoding="utf-8"))
    return [parse_sample(json.loads(line)) for line in lines]


def test_a_prepared_folder(make_recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare(make_recipe())
    found = load_prepared(out)
    assert sorted(files(out)) == ["examples/00000.arrow", "manifest.json", "samples-00000.jsonl"]
    assert [s.id for s in samples_of(out)] == [id for e in found.examples for id in e.sample_ids]
    assert found.manifest["num_samples"] == found.manifest["num_examples"] == len(found.examples) == 200
    assert found.manifest["num_tokens"] == sum(map(len, found.examples))
    assert found.manifest["blocks_per_example"] == {"5": 200}
    assert capsys.readouterr() == ("", "")
    print_summary(make_recipe())
    printed = capsys.readouterr()
    assert "200 examples, 200 of them split" in printed.out and printed.err == ""


def test_the_chat_template_of_the_recipe_replaces_that_of_the_tokenizer(
    make_recipe: Make, tmp_path: Path
) -> None:
    recipe = make_recipe()
    path = tmp_path / "thinking.jinja"
    recipe.model.chat_template = str(path)
    for content, fault in (
        (None, "cannot be read"),
        (" \n", "is empty"),
        ("{% for %}", "line 1 cannot be r"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=fault):
            prepare(recipe)
    path.write_text(CHATML.replace("assistant\n'", r"assistant\n<think>\n'"))
    with pytest.raises(UserError, match="ends its generation prompt with .*<think>.*, but writes "):
        prepare(recipe)
    path.write_text(CHATML.replace("assistant\n'", r"assistant\n<think>\n\n</think>\n\n'"))
    example = load_prepared(prepare(recipe)).examples[0]
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    is_label = example.labels != IGNORE_INDEX
    assert tokenizer.decode(example.input_ids[~is_label]).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(example.labels[is_label]) == "The fox<|im_end|>"


@pytest.mark.parametrize("shared_context", [False, True])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    make_recipe: Make, tmp_path: Path, shared_context: bool
) -> None:
    options: dict[str, Any] = {
        "shared_context": shared_context,
        "too_long": TooLongPolicy.trim,
        "row_len": 128,
    }
    one, other = (
        prepare(make_recipe(**options, num_workers=n, output_dir=str(tmp_path / "by" / str(n))))
        for n in (1, 3)
    )
    assert files(one) == files(other)
    assert str(one).encode() not in (one / "manifest.json").read_bytes()
    assert json.loads(one.with_name("1.log").read_text())["num_workers"] == 1


def test_questions_with_the_same_documents_share_their_context(make_recipe: Make) -> None:
    found = load_prepared(prepare(make_recipe(shared_context=True)))
    assert len(found.examples) == 100
    assert {example.num_final for example in found.examples} == {2}
    assert found.examples[0].sample_ids == ("0", "1")


def test_max_questions_per_context_limits_shared_contexts(make_recipe: Make) -> None:
    found = load_prepared(prepare(make_recipe(shared_context=True, max_questions_per_context=1)))
    assert {example.num_final for example in found.examples} == {1} and len(found.examples) == 200


def test_copies_have_other_orders_of_the_documents(make_recipe: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sources": [squad_source(tmp_path, "A")], "order": Order.shuffled}
    once = samples_of(prepare(make_recipe(**options)))
    out = prepare(make_recipe(**options, num_copies=3), overwrite=True)
    copies = samples_of(out)
    assert copies[: len(once)] == once and len(copies) == 3 * len(once)
    orders = {tuple(s.blocks[:-1] for s in copies if s.id == sample.id) for sample in once}
    assert all(len(three) == 3 for three in orders) and any(len(set(three)) > 1 for three in orders)
    # the second copy equals a single copy with the next seed
    next_seed = samples_of(prepare(make_recipe(**options, seed=1), overwrite=True))
    assert copies[len(once) : 2 * len(once)] == next_seed
    manifest = load_prepared(prepare(make_recipe(**options, num_copies=3), overwrite=True)).manifest
    assert manifest["sources"][0]["read"] == 30 == manifest["num_samples"]


def test_copies_of_records_without_ids_equal_those_of_other_seeds(make_recipe: Make, tmp_path: Path) -> None:
    path = tmp_path / "nq.jsonl"
    contexts = [{"title": f"T{i}", "text": f"text {i}"} for i in range(6)]
    records = [{"question": f"q{i}?", "answers": ["text"], "ctxs": contexts} for i in range(4)]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"question": 1}]))
    options: dict[str, Any] = {
        "sources": [Source(format=Format.fid, path=str(path))],
        "order": Order.shuffled,
    }
    options["on_bad_record"] = BadRecordPolicy.skip
    out = prepare(make_recipe(**options, num_copies=2))
    copies = samples_of(out)
    (counts,) = load_prepared(out).manifest["sources"]
    assert [s.id for s in copies] == 2 * [f"nq-{n}" for n in range(1, 5)]
    assert copies[4:] == samples_of(prepare(make_recipe(**options, seed=1), overwrite=True)) != copies[:4]
    assert counts["dropped"] == {"bad record": 2} and len(counts["bad_records"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # samples already contain their documents, so no order applies
        ({"num_copies": 2, "order": Order.shuffled}, "all copies would be the same"),
    ],
)
def test_copies_that_would_be_the_same_are_refused(
    make_recipe: Make, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(make_recipe(**options))


@pytest.mark.parametrize(
    ("options", "key", "reason"),
    [
        ({"num_documents": 2}, "data.num_documents", "already contain their documents"),
        ({"order": Order.given}, "data.order", "already contain their documents"),
        (
            {"prompt": PromptSettings(question="{question}")},
            "data.prompt.question",
            "already contain their documents",
        ),
        ({"max_questions_per_context": 2}, "data.max_questions_per_context", "shared_context is false"),
        ({"splitting": SplittingSettings(max_blocks=2)}, "data.splitting.max_blocks", "chats"),
        ({"dense_model": "other/model"}, "data.dense_model", "retriever: dense"),
    ],
)
def test_a_setting_without_effect_is_a_warning(
    make_recipe: Make, capsys: pytest.CaptureFixture[str], options: dict[str, Any], key: str, reason: str
) -> None:
    expected = files(prepare(make_recipe()))
    capsys.readouterr()
    out = prepare(make_recipe(**options), overwrite=True)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith(f"blockft: warning: {key} has no effect on data.sources: ") and reason in line
    assert {name: data for name, data in files(out).items() if name != "manifest.json"} == {
        name: data for name, data in expected.items() if name != "manifest.json"
    }


def test_settings_that_have_an_effect_give_no_warning(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"num_documents": 2, "order": Order.shuffled, "shared_context": True}
    sources = [squad_source(tmp_path, "A")]
    prepare(make_recipe(**options, max_questions_per_context=2, sources=sources))
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "varies"),
    [
        ({}, False),
        ({"order": Order.given, "shared_context": True}, False),
        ({"shared_context": True}, True),
        ({"num_documents": 2}, True),
        ({"num_documents": 2, "order": Order.given, "shared_context": True}, True),
        ({"num_documents": 2, "retriever": Retriever.bm25}, False),
    ],
)
def test_copies_are_refused_where_the_seed_changes_nothing(
    make_recipe: Make, tmp_path: Path, options: dict[str, Any], varies: bool
) -> None:
    source = squad_source(tmp_path, "ABCDEF", retriever=options.get("retriever", Retriever.none))
    options = {name: value for name, value in options.items() if name != "retriever"} | {"sources": [source]}
    one, other = (samples_of(prepare(make_recipe(**options, seed=seed), overwrite=True)) for seed in (0, 1))
    assert (one != other) is varies
    recipe = make_recipe(**options, num_copies=2)
    if varies:
        assert samples_of(prepare(recipe, overwrite=True)) == one + other
    else:
        with pytest.raises(UserError, match="all copies would be the same"):
            prepare(recipe, overwrite=True)


def test_a_sample_longer_than_a_row_is_dropped_or_trimmed(make_recipe: Make) -> None:
    dropped = load_prepared(prepare(make_recipe(row_len=128))).manifest["sources"][0]["dropped"]["too long"]
    out = prepare(make_recipe(row_len=128, too_long=TooLongPolicy.trim), overwrite=True)
    assert 0 < load_prepared(out).manifest["sources"][0]["dropped"]["too long"] < dropped
    trimmed = [sample for sample in samples_of(out) if len(sample.documents) == 1]
    assert trimmed and all(sample.meta["relevance"] == [1] for sample in trimmed)
    assert max(map(len, load_prepared(out).examples)) <= 128


def test_a_source_without_a_kept_sample_is_a_warning(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_recipe().data.sources[0]
    bad, blank = tmp_path / "bad.jsonl", tmp_path / "blank.jsonl"
    bad.write_text("broken\n")
    blank.write_text("\n")
    long = tmp_path / "long.jsonl"
    record = {"question": "Who?", "answers": ["a"], "ctxs": [{"title": "t", "text": "word " * 2000}]}
    long.write_text(f"{json.dumps(record)}\n")
    others = [Source(format=Format.samples, path=str(path)) for path in (bad, blank)]
    others.append(Source(format=Format.fid, path=str(long)))
    recipe = make_recipe(sources=[source, *others], on_bad_record=BadRecordPolicy.skip)
    prepare(recipe)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith(f"blockft: warning: every sample of {bad} was dropped (bad record: 1): correct")
    assert second == f"blockft: warning: {blank} holds no samples"
    assert re.fullmatch(
        rf"blockft: warning: every sample of {long} was dropped \(too long: 1; the shortest has [\d,]+ "
        r"tokens\): raise data.row_len, which is 1,024, or lower data.num_documents",
        third,
    )


def test_the_summary_says_how_the_rows_are_padded(
    make_recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(row_len=8192)
    prepare(recipe)
    print_summary(recipe)
    assert "padded to 8 (train.batch_rows is 8)" in capsys.readouterr().out


def test_bad_records_are_counted_and_listed(make_recipe: Make) -> None:
    recipe = make_recipe(on_bad_record=BadRecordPolicy.skip)
    path = Path(recipe.data.sources[0].path)
    path.write_text(path.read_text() + "broken\n")
    source = load_prepared(prepare(recipe)).manifest["sources"][0]
    assert (source["read"], source["kept"], source["dropped"]) == (201, 200, {"bad record": 1})
    assert "line 201: not JSON" in source["bad_records"][0]


def test_the_first_samples_that_are_too_long_are_listed(make_recipe: Make) -> None:
    recipe = make_recipe(row_len=60)
    (source,) = load_prepared(prepare(recipe)).manifest["sources"]
    number, examples = source["dropped"]["too long"], source["drop_examples"]["too long"]
    assert number == 200 - source["kept"] > 3 == len(examples)
    first = source["kept"]  # the samples become longer
    assert examples[0].startswith(f"{first}: 61 tokens in 5 blocks, Question {first}?"), examples


def test_unknown_fields_are_counted_and_warned_of_once(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi", "mood": "\ud800"}], "color [b]": 1}
    chat["messages"].append({"role": "assistant", "content": "Hello"})  # type: ignore[attr-defined]
    path = tmp_path / "chats.jsonl"
    path.write_text((json.dumps(chat) + "\n") * 3)
    found = load_prepared(prepare(make_recipe(sources=[Source(format=Format.messages, path=str(path))])))
    assert found.manifest["sources"][0]["unknown_fields"] == {"color [b]": 3, "messages[].mood": 3}
    (warning,) = capsys.readouterr().err.splitlines()
    assert "color [b] (3), messages[].mood (3)" in warning and str(path) in warning


def test_a_prepared_folder_is_replaced_only_with_overwrite(make_recipe: Make) -> None:
    out = prepare(make_recipe())
    before = files(out)
    with pytest.raises(UserError, match="exists"):
        prepare(make_recipe(seed=1))
    assert files(out) == before
    prepare(make_recipe(seed=1), overwrite=True)
    assert load_prepared(out).manifest["options"]["seed"] == 1


def test_an_incomplete_folder_is_replaced_only_with_overwrite(make_recipe: Make) -> None:
    out = prepare(make_recipe())
    (out / "manifest.json").unlink()
    (out / ".DS_Store").touch()
    with pytest.raises(UserError, match="add --overwrite"):
        prepare(make_recipe())
    assert load_prepared(prepare(make_recipe(), overwrite=True)).manifest


@pytest.mark.parametrize(
    "name", ["thesis.tex", "samples-2024.jsonl", "examples/mine.arrow", "run/manifest.json", ".git/config"]
)
@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_folder_with_files_of_others_is_left_unchanged(
    make_recipe: Make, name: str, is_prepared: bool
) -> None:
    recipe = make_recipe()
    out = prepare(recipe) if is_prepared else Path(recipe.data.output_dir)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("precious")
    before = files(out)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"not a prepared folder .it holds {name}.: set data.output_dir"):
            prepare(recipe, overwrite=overwrite)
    assert files(out) == before


def broken_line(recipe: Recipe) -> Recipe:
    path = Path(recipe.data.sources[0].path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:100], lines[100][:40], *lines[101:]]))
    return recipe


def empty(recipe: Recipe) -> Recipe:
    Path(recipe.data.sources[0].path).write_text("\n")
    return recipe


def with_data(**settings: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: recipe.model_copy(update={"data": recipe.data.model_copy(update=settings)})


def with_model(path: str) -> Callable[[Recipe], Recipe]:
    return lambda recipe: recipe.model_copy(update={"model": ModelSettings(path=path)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken_line, r"source.jsonl, line 101: not JSON"),
        (empty, "no example to train on: .*source.jsonl holds no samples"),
        (
            with_data(row_len=20),
            r"every sample of .*source.jsonl was dropped \(too long: 200; the shortest has \d+ tokens\): "
            "raise data.row_len, which is 20$",
        ),
        (with_data(sources=[Source(format=Format.samples, path="data/none.jsonl")]), "data/none.jsonl"),
        (with_data(sources=[Source(format=Format.samples, path="owner/name", split="train")]), "owner/name"),
        (with_data(prompt=PromptSettings(document="{txt}")), "{txt}"),
        (with_model("/no/such/model"), "/no/such/model"),
        (with_model("owner/name"), "owner/name"),
    ],
)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_is_one_sentence_and_nothing_is_written(
    make_recipe: Make, spoil: Callable[[Recipe], Recipe], message: str, num_workers: int
) -> None:
    recipe = spoil(make_recipe(num_workers=num_workers))
    with pytest.raises(UserError, match=message) as raised:
        prepare(recipe)
    assert "\n" not in str(raised.value)
    out = Path(recipe.data.output_dir)
    written = [path.name for path in out.parent.iterdir()] if out.parent.exists() else []
    # samples that were read are kept for the next attempt
    assert written == (["set.cache"] if recipe.data.row_len == 20 else [])


def squad_source(folder: Path, titles: str = "AB", retriever: Retriever = Retriever.none) -> Source:
    path = folder / "squad.json"
    path.write_text(json.dumps({"data": [article(title) for title in titles]}))
    return Source(format=Format.squad, path=str(path), retriever=retriever)


def test_the_manifest_accounts_for_every_record(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe()
    sources = [squad_source(tmp_path), *recipe.data.sources]
    out = prepare(make_recipe(sources=sources, num_documents=2, shared_context=True))
    squad, samples = load_prepared(out).manifest["sources"]
    assert squad["read"] == 20 == squad["kept"] + sum(squad["dropped"].values())
    assert squad["kept"] == squad["samples"] and set(squad["dropped"]) == {
        "answer in another document of its set"
    }
    assert (samples["format"], samples["read"], samples["samples"], samples["kept"]) == (
        "samples",
        200,
        200,
        200,
    )
    examples = load_prepared(out).examples
    assert len(examples) < 100 + squad["kept"]
    assert max(example.num_final for example in examples) == 4


def test_chats_are_split_and_give_a_sample_per_answer(make_recipe: Make, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [
        "The quick brown fox jumps over the dog.\n\nThe lazy dog sleeps, too.",
        "Fine.",
        "Who?",
        "The fox.",
    ]
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    path.write_text(json.dumps({"id": "c", "messages": chat}) + '\n{"messages": []}\n')
    source = Source(format=Format.messages, path=str(path))
    splitting = SplittingSettings(min_block_tokens=2)
    out = prepare(make_recipe(sources=[source], on_bad_record=BadRecordPolicy.skip, splitting=splitting))
    (counts,) = load_prepared(out).manifest["sources"]
    assert (counts["read"], counts["samples"], counts["kept"]) == (2, 2, 2)
    assert counts["dropped"] == {"bad record": 1}
    first = samples_of(out)[0].messages[0].content
    assert len(first) == 2 and "".join(first) == turns[0]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_retrieval_gives_the_same_bytes_for_any_number_of_workers(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setattr(sample_frames, "FRAME_SAMPLES", 32)  # several tasks, so that the workers share them
    source = squad_source(tmp_path, "ABCDEFGHI", retriever=Retriever.bm25)
    options: dict[str, Any] = {"sources": [source], "num_documents": 3, "order": Order.shuffled}
    one, other = (
        prepare(make_recipe(**options, num_workers=n, output_dir=str(tmp_path / "by" / str(n))))
        for n in (1, num_workers + 1)
    )
    assert files(one) == files(other)
    assert load_prepared(one).manifest["num_samples"] == 90


def test_samples_that_the_template_changes_are_counted_and_listed(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_tokens = Encoder.count_tokens

    def refuse_marker(self: Encoder, texts: Sequence[str]) -> list[int]:
        if any("marker" in text for text in texts):
            raise TemplateMismatch("the vocabulary spells a marker", "added token spelled by a text")
        return count_tokens(self, texts)

    monkeypatch.setattr(Encoder, "count_tokens", refuse_marker)
    path = tmp_path / "alpaca.jsonl"
    texts = ["marker" if n % 50 == 7 else "fox" for n in range(200)]
    records = [{"id": str(n), "instruction": f"a\n\n{text}", "output": "x"} for n, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, records)) + "\nbroken\n")
    options: dict[str, Any] = {"sources": [Source(format=Format.alpaca, path=str(path))]}
    options |= {"splitting": SplittingSettings(min_block_tokens=1), "on_bad_record": BadRecordPolicy.skip}
    one, other = (
        prepare(make_recipe(**options, num_workers=n, output_dir=str(tmp_path / "by" / str(n))))
        for n in (1, 3)
    )
    assert files(one) == files(other)
    (counts,) = load_prepared(one).manifest["sources"]
    unfit = "added token spelled by a text"
    assert (counts["kept"], counts["dropped"]) == (196, {unfit: 4, "bad record": 1})
    assert "line 201: not JSON" in counts["bad_records"][0]
    assert counts["bad_records"][1:] == [f"sample {n}: {unfit}" for n in (7, 57, 107, 157)]
    sources = [*options["sources"], squad_source(tmp_path)]
    twice = prepare(make_recipe(**options | {"sources": sources, "num_documents": 2, "num_copies": 2}))
    again = load_prepared(twice).manifest["sources"][0]
    assert again["dropped"] == {unfit: 8, "bad record": 2} and again["bad_records"] == counts["bad_records"]
    path.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(UserError, match=r"^sample 7 of alpaca: the vocabulary spells a marker \(data\.on_"):
        prepare(make_recipe(**options | {"on_bad_record": BadRecordPolicy.error}), overwrite=True)


REAL = {
    Format.squad: ("squadshifts_new_wiki_dev.json", Retriever.none),
    Format.fid: ("nq_open_oracle_dev.jsonl", Retriever.bm25),
    Format.hotpotqa: ("hotpotqa_distractor_train.json", Retriever.none),
    Format.two_wiki: ("2wikimultihopqa_train.json", Retriever.bm25),
    Format.musique: ("musique_train.jsonl", Retriever.none),
}


@pytest.mark.real_data
@pytest.mark.parametrize("format", REAL)
def test_real_prompts_equal_the_rendered_template_and_equal_blocks_have_equal_ids(
    make_recipe: Make, toy_model: Path, format: Format
) -> None:
    name, retriever = REAL[format]
    path = Path(os.environ.get("BLOCKFT_REAL_DATA", "../shared/data")) / name
    if not path.exists():
        pytest.skip(f"{path} is not there (set BLOCKFT_REAL_DATA)")
    source = Source(format=format, path=str(path), max_samples=40, retriever=retriever)
    out = prepare(make_recipe(sources=[source], row_len=16384, num_documents=10))
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    assert load_prepared(out).manifest["sources"][0]["kept"] == 40
    ids_of: dict[str, list[int]] = {}
    for sample, example in zip(samples_of(out), load_prepared(out).examples, strict=True):
        blocks = [tokenizer.decode(block) for block in example.blocks]
        chat = [{"role": m.role, "content": m.text} for m in sample.messages]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert "".join(blocks) == f"{prompt}{sample.response}<|im_end|>"
        for text, ids in zip(blocks, example.blocks, strict=True):
            assert ids_of.setdefault(text, ids.tolist()) == ids.tolist()


def test_a_wording_that_changes_document_blocks_is_refused(make_recipe: Make) -> None:
    with pytest.raises(UserError, match="data.prompt.document ends in"):
        prepare(make_recipe(prompt=PromptSettings(document="{title}\n{text}\n\n")))


def test_names_with_brackets_are_printed_unchanged(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich would read [red] as a colour."""
    recipe = make_recipe()
    monkeypatch.chdir(tmp_path)
    Path("[red].jsonl").write_text(Path(recipe.data.sources[0].path).read_text())
    recipe.data.sources[0].path = "[red].jsonl"
    prepare(recipe)
    print_summary(recipe)
    assert "[red].jsonl" in capsys.readouterr().out


def test_paths_and_sources_are_printed_without_markup(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = "q[/b] $x$ :smile: \x1b[2J\u202e"
    recipe = make_recipe(output_dir=str(tmp_path / odd / "data"))
    source = Path(recipe.data.sources[0].path)
    (tmp_path / odd).mkdir(parents=True)
    recipe.data.sources[0].path = str(source.rename(tmp_path / odd / "source.jsonl"))
    prepare(recipe)
    print_summary(recipe)
    printed = capsys.readouterr()
    assert r"q[/b] $x$ :smile: \u001b[2J\u202e/data: 200 examples" in printed.out
    inspect(Path(recipe.data.output_dir), png=tmp_path / "mask.png")
    printed_all = printed.out + printed.err + "".join(capsys.readouterr())
    assert r":smile: \u001b[2J\u202e" in printed_all and not set(printed_all) & {"\x1b", "\u202e"}


def columns_source(path: Path, records: list[dict[str, Any]], columns: dict[str, Any], **more: Any) -> Source:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Source.model_validate({"format": "columns", "path": str(path), "columns": columns} | more)


def test_columns_of_questions_and_chats_are_prepared(
    tmp_path: Path, make_recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [
        {"q": f"Question {n}?", "docs": [f"Fox {n}."], "a": f"fox {n}", "url": "u"} for n in range(3)
    ]
    mapping = {"question": "q", "documents": "docs", "answers": "a"}
    pairs = [{"i": "Do.\n\nThe first part.\n\nThe second part.", "o": "Done.", "topic": "x"}]
    sources = [
        columns_source(tmp_path / "questions.jsonl", questions, mapping),
        columns_source(tmp_path / "pairs.jsonl", pairs, {"prompt": "i", "completion": "o"}),
    ]
    folder = prepare(make_recipe(sources=sources, splitting=SplittingSettings(min_block_tokens=1)))
    assert "warning" not in capsys.readouterr().err
    prepared = load_prepared(folder)
    first, second = prepared.manifest["sources"]
    assert (first["kept"], first["has_questions"], first["unknown_fields"]) == (3, True, {"url": 3})
    assert (second["kept"], second["has_questions"], second["unknown_fields"]) == (1, False, {"topic": 1})
    # markup, instruction, document, question; markup and the three parts of the instruction
    assert [len(example.block_lengths) for example in prepared.examples] == [4, 4, 4, 4]


def test_a_corpus_that_is_missing_writes_nothing(tmp_path: Path, make_recipe: Make) -> None:
    mapping = {"question": "q", "answers": "a"}
    more = {"corpus": str(tmp_path / "none.jsonl"), "retriever": "bm25"}
    source = columns_source(tmp_path / "questions.jsonl", [{"q": "Who?", "a": "fox"}], mapping, **more)
    recipe = make_recipe(sources=[source], num_documents=2)
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        prepare(recipe)
    assert not Path(recipe.data.output_dir).exists()


def test_a_changed_corpus_is_read_again(tmp_path: Path, make_recipe: Make) -> None:
    mapping = {"question": "q", "answers": "a"}
    corpus = tmp_path / "corpus.jsonl"
    more = {"corpus": str(corpus), "retriever": "bm25"}
    source = columns_source(tmp_path / "questions.jsonl", [{"q": "Who ran?", "a": "fox"}], mapping, **more)
    recipe = make_recipe(sources=[source], num_documents=1)
    blocks = []
    for text in ("A fox ran.", "The fox ran."):
        corpus.write_text(json.dumps({"text": text}) + "\n")
        (sample,) = samples_of(prepare(recipe, overwrite=True))
        blocks.append(sample.blocks[sample.documents[0]].strip())
    assert blocks == ["A fox ran.", "The fox ran."]
