"""The public API of the engine: every kind of request, batches, streams, options, errors and closing."""

import math
from collections.abc import Callable, Generator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import blockft.inference.decoding as decoding
from blockft.config.settings import PromptSettings
from blockft.data.rag_prompt import Document, RagPrompt
from blockft.data.sample import Sample
from blockft.errors import UserError
from blockft.inference.answer import Answer
from blockft.inference.cache_folder import CacheFolder
from blockft.inference.engine import Engine
from blockft.inference.runner import CacheOptions
from blockft.inference.sampling import Sampler
from tests.inference.engines import PROMPT, ROTATE, greedy, load_engine, options
from tests.run import save_model

DOCUMENTS = [{"title": "Foxes", "text": "They are red."}, {"text": "Dogs bark."}, "Cows are large."]
REQUESTS: list[dict[str, Any]] = [
    {"documents": DOCUMENTS, "question": "What barks?"},
    {"documents": DOCUMENTS[:1], "question": "Who?"},
    {"messages": [{"role": "user", "content": ["Read.\n", "Dogs bark.\n", "What barks?"]}]},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]},
    {"blocks": ["<|user|>one ", "two ", "three?<|end|><|assistant|>"]},
]


@pytest.fixture(params=ROTATE)
def engine(request: pytest.FixtureRequest, toy_model: Path) -> Engine:
    return load_engine(toy_model, request.param)


def read_stream(pieces: Generator[str, None, Answer]) -> tuple[list[str], Answer]:
    texts = []
    while True:
        try:
            texts.append(next(pieces))
        except StopIteration as end:
            return texts, end.value


def parse_samples(engine: Engine) -> list[Sample]:
    return [engine.parse_request(record, str(i)) for i, record in enumerate(REQUESTS)]


def test_every_kind_of_request_gets_the_answer_of_the_masked_forward(engine: Engine) -> None:
    engine.eos_token_ids = set()
    for record, prompt in zip(REQUESTS, parse_samples(engine), strict=True):
        answer = engine.generate(**record, max_new_tokens=4)
        blocks = engine.encode(prompt, 4)
        assert answer.ids == greedy(engine.model, blocks, 4)
        assert answer.num_blocks == len(blocks) and answer.prompt_tokens == sum(map(len, blocks))
        decoded = engine.tokenizer.decode(answer.ids, skip_special_tokens=True)
        assert answer.text == decoded.strip()


def test_a_document_is_reused_at_any_position(engine: Engine) -> None:
    engine.generate(documents=DOCUMENTS, question="Who?", max_new_tokens=2)
    answer = engine.generate(documents=DOCUMENTS[::-1], question="Which one?", max_new_tokens=2)
    assert answer.blocks_reused == answer.num_blocks - 1 > len(DOCUMENTS)
    keys = engine.document_keys(
        [Document(title="Foxes", text="They are red."), Document(title="", text="New")]
    )
    assert len(engine.runner.block_cache.lookup(keys)) == len(keys) - 1


def test_tuples_and_numpy_numbers_are_accepted(engine: Engine) -> None:
    for record in REQUESTS:
        expected = engine.generate(**record, max_new_tokens=4)
        assert engine.generate(**in_tuples(record), max_new_tokens=np.int64(4)).ids == expected.ids


def in_tuples(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: in_tuples(value) for name, value in found.items()}
    return tuple(map(in_tuples, found)) if isinstance(found, list) else found


def test_prompts_of_a_batch_get_the_answers_that_they_get_alone(engine: Engine) -> None:
    for settings in ({}, {"mode": "full"}):
        together = engine.generate_batch(parse_samples(engine), max_new_tokens=6, **settings)
        alone = [engine.generate(**record, max_new_tokens=6, **settings) for record in REQUESTS]
        assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert engine.generate_batch([]) == []


def test_sampling_does_not_depend_on_the_batch(engine: Engine) -> None:
    drawn = {"temperature": 8.0, "top_p": 0.99, "max_new_tokens": 6}
    together = engine.generate_batch(parse_samples(engine), seed=5, **drawn)
    alone = [engine.generate(**record, seed=5 + i, **drawn) for i, record in enumerate(REQUESTS)]
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert engine.generate(**REQUESTS[0], seed=6, **drawn).ids != alone[0].ids
    assert engine.generate(**REQUESTS[0], seed=5, **drawn).ids == alone[0].ids


def test_block_and_full_mode_are_equal_for_one_block(engine: Engine) -> None:
    prompt = [[*range(40, 90)]]
    block, full = (
        engine.generate_ids([prompt], mode=mode, max_new_tokens=8)[0] for mode in ("block", "full")
    )
    assert block.ids == full.ids and full.sources == {}


def test_full_mode_is_the_layout_of_one_block(engine: Engine) -> None:
    engine.eos_token_ids = set()
    for prompt in parse_samples(engine):
        blocks = engine.encode(prompt, 5)
        (full,) = engine.generate_ids([blocks], mode="full", max_new_tokens=5)
        assert full.ids == greedy(engine.model, [[id for block in blocks for id in block]], 5)
        assert full.num_blocks == 1 and full.prompt_tokens == sum(map(len, blocks))
    assert not engine.runner.block_cache.host.num_blocks


# the end of an answer


def test_an_answer_ends_before_an_end_of_sequence_token(engine: Engine) -> None:
    engine.eos_token_ids = set()
    whole = engine.generate(**REQUESTS[0], max_new_tokens=8)
    end = next(i for i in range(1, 8) if whole.ids[i] not in whole.ids[:i])
    engine.eos_token_ids = {whole.ids[end]}
    shorter = engine.generate(**REQUESTS[0], max_new_tokens=8)
    assert shorter.ids == whole.ids[:end]
    engine.eos_token_ids = {whole.ids[0]}
    empty = engine.generate(**REQUESTS[0], max_new_tokens=8)
    assert empty.ids == () and empty.text == "" and empty.tokens_per_s is None
    together = engine.generate_batch(parse_samples(engine)[:2], max_new_tokens=8)
    assert together[0].ids == () and together[1].ids


def test_speed_does_not_depend_on_the_reader_or_the_batch(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count()
    monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    engine.eos_token_ids = set()
    blocks = [engine.encode(prompt, 60) for prompt in parse_samples(engine)[:2]]
    (whole,) = engine.generate_ids(blocks[:1], max_new_tokens=4)
    engine.eos_token_ids = {whole.ids[3]}
    together = engine.generate_ids(blocks, max_new_tokens=60)
    assert len(together[0].ids) < 4 < len(together[1].ids)
    # every step takes one second by this clock
    assert [answer.tokens_per_s for answer in together] == [1, 1]

    pieces = engine.stream_ids(blocks[1], max_new_tokens=60)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            assert end.value.tokens_per_s == 1
            break
        next(clock)  # the reader is slow


def test_end_of_sequence_tokens_are_those_of_the_template_and_the_generation_config(toy_model: Path) -> None:
    engine = load_engine(toy_model)
    assert engine.eos_token_ids == {engine.tokenizer.eos_token_id}
    engine.model.generation_config.eos_token_id = [7, 8]
    again = Engine(engine.model, engine.tokenizer, cache=options())
    assert again.eos_token_ids == {7, 8, engine.tokenizer.eos_token_id}


@pytest.mark.parametrize("num_new", [1, 3])
def test_answers_have_at_most_max_new_tokens(engine: Engine, num_new: int) -> None:
    engine.eos_token_ids = set()
    for answer in engine.generate_batch(parse_samples(engine), max_new_tokens=num_new):
        assert len(answer.ids) == num_new
        assert (answer.tokens_per_s is None) == (num_new == 1)


def test_a_stop_string_ends_only_the_answers_that_contain_it(engine: Engine) -> None:
    engine.eos_token_ids = set()
    whole = engine.generate_batch(parse_samples(engine), max_new_tokens=12)
    stop = whole[0].text[3:5]
    stopped = engine.generate_batch(parse_samples(engine), max_new_tokens=12, stop=[stop])
    assert stopped[0].text == whole[0].text[: whole[0].text.index(stop)].strip() and len(stopped[0].ids) < 12
    for before, after in zip(whole, stopped, strict=True):
        assert after.text == before.text.partition(stop)[0].strip()


# streams


@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0, "seed": 4}, {"mode": "full"}, {"stop": ["e"]}])
def test_the_pieces_of_a_stream_are_the_text_of_the_answer(engine: Engine, settings: dict[str, Any]) -> None:
    for record, prompt in zip(REQUESTS, parse_samples(engine), strict=True):
        pieces, answer = read_stream(engine.stream(prompt, max_new_tokens=10, **settings))
        assert "".join(pieces).strip() == answer.text and all(pieces)
        plain = engine.generate(**record, max_new_tokens=10, **settings)
        assert (answer.text, answer.ids) == (plain.text, plain.ids)
        # a request and its sample are equivalent
        (batched,) = engine.generate_batch([record], max_new_tokens=10, **settings)
        assert read_stream(engine.stream(record, max_new_tokens=10, **settings))[0] == pieces
        assert (batched.text, batched.ids) == (plain.text, plain.ids)


def test_the_first_piece_comes_before_the_last_token(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.eos_token_ids, steps = set(), []
    monkeypatch.setattr(Sampler, "__call__", lambda *given: steps.append(1) or given[1].argmax(dim=-1))
    pieces = engine.stream_ids([[65, 66], [67]], max_new_tokens=50)
    next(pieces)
    assert len(steps) < 25


# errors


def test_the_error_about_a_long_prompt_names_the_prompt_and_a_remedy(engine: Engine) -> None:
    prompt = engine.parse_request({"documents": ["x" * 5000], "question": "?"}, "the third")
    with pytest.raises(UserError, match=r"prompt the third: .* the model has 4096 positions: use fewer"):
        engine.generate_batch([prompt])
    with pytest.raises(UserError, match="no document can be spared"):
        engine.generate_batch([prompt], trim=True)
    chat = {"messages": [{"role": "user", "content": "x" * 5000}]}
    for request in ({"documents": ["x"], "question": "?" * 5000}, chat):
        with pytest.raises(UserError, match="shorten its question, or ask for fewer new tokens"):
            engine.generate_batch([engine.parse_request(request)])
    with pytest.raises(UserError, match="need 4097 tokens"):
        engine.generate_ids([[[1] * 4000, [2]]], max_new_tokens=96)
    engine.eos_token_ids = set()
    assert len(engine.generate_ids([[[1] * 4000, [2] * 92]], max_new_tokens=4)[0].ids) == 4


def test_trim_drops_the_documents_with_the_lowest_scores(engine: Engine) -> None:
    scores = [0.3, 0.1, 0.9, 0.2]
    documents = [{"text": str(i) * 1500, "score": score} for i, score in enumerate(scores)]
    prompt = engine.parse_request({"documents": documents, "question": "?"})
    blocks = engine.encode(prompt, 100, trim=True)
    texts = [engine.tokenizer.decode(block) for block in blocks]
    assert [text[1] for text in texts if len(text) > 1000] == ["0", "2"]
    with pytest.raises(UserError, match="no document can be spared"):
        engine.encode(prompt, 3500, trim=True)


def test_a_prompt_without_a_token_is_refused(engine: Engine) -> None:
    for prompt in ([], [[]], [[1, 2], []], [[], [1, 2]]):
        with pytest.raises(UserError, match="at least one token"):
            engine.generate_ids([prompt])
    with pytest.raises(UserError, match="blocks"):
        engine.generate(blocks=["", "who?"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "have 'documents' and 'question'"),
        ({"documents": ["a"]}, "question"),
        ({"question": "a", "blocks": ["b"]}, "have 'documents' and 'question'"),
        ({"messages": []}, "messages"),
        ({"blocks": ["a"], "mode": "half"}, "mode is 'half' (allowed: block, full)"),
        ({"blocks": ["a"], "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"blocks": ["a"], "max_new_tokens": "4"}, "max_new_tokens is '4', it should be a whole number"),
        ({"blocks": ["a"], "max_new_tokens": 4.0}, "max_new_tokens is 4.0"),
        ({"blocks": ["a"], "temperature": "x"}, "temperature is 'x'"),
        ({"blocks": ["a"], "top_p": 0.9}, "top_p is 0.9 at temperature 0"),
        ({"blocks": ["a"], "stop": [5]}, "stop is [5]"),
        ({"documents": [{"text": "a", "score": math.nan}], "question": "b"}, "score' is nan"),
        ({"blocks": ["a"], "temperature": -1}, "temperature is -1"),
        ({"blocks": ["a"], "top_p": 0}, "top_p is 0"),
        ({"blocks": ["a"], "stop": "a"}, "stop is 'a'"),
        ({"blocks": ["a"], "stop": [""]}, "non-empty"),
    ],
)
def test_a_malformed_request_gives_an_error_of_one_line(
    toy_model: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        load_engine(toy_model).generate(**given)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_questions_are_worded_as_given_or_as_in_training_or_by_default(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    engine = Engine.load(str(path), device="cpu", cache=options())
    documents = [{"text": "a", "score": 2}, {"text": "b", "score": 3}, {"text": "c", "score": 1}]
    request = {"documents": documents, "question": "Who?"}
    assert engine.prompt == RagPrompt(order="given")
    assert engine.parse_request(request).messages[0].content == (
        "Answer the question using the following documents.",
        *("\n\na", "\n\nb", "\n\nc"),
        "\n\nQuestion: Who?\nAnswer in a few words.",
    )
    own = {"instruction": "Own.\n", "document": "{text}\n", "question": "{question}"}
    engine.model.config.block_attention = {"prompt": own, "documents_in": "user", "order": "ascending"}
    trained = Engine(engine.model, engine.tokenizer, cache=options())
    assert trained.prompt.instruction == "Own.\n"
    content = trained.parse_request(request).messages[0].content
    assert content == ("Own.\n", "a\n", "b\n", "c\n", "Who?"), "the given order, not the one of training"
    assert Engine(engine.model, engine.tokenizer, prompt=PROMPT, cache=options()).prompt == PROMPT


def test_the_default_wording_is_that_of_recipes() -> None:
    settings, prompt = PromptSettings(), RagPrompt()
    for name in ("instruction", "document", "question", "documents_in"):
        assert getattr(settings, name) == getattr(prompt, name)


# the end of an engine


def test_a_closed_engine_has_written_all_blocks_and_refuses_requests(toy_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with load_engine(toy_model, cache=options(folder)) as engine:
        stream = engine.stream(REQUESTS[0], max_new_tokens=20)
        next(stream)
        num_blocks = engine.generate(**REQUESTS[0], max_new_tokens=2).num_blocks
    assert len(list(CacheFolder(folder).entries())) == num_blocks - 1
    engine.close()
    calls: list[Callable[[], object]] = [
        lambda: engine.generate(**REQUESTS[0]),
        lambda: engine.generate_batch(REQUESTS),
        lambda: engine.generate_ids([[[1, 2]]]),
        lambda: next(engine.stream(REQUESTS[0])),
        lambda: next(stream),
        lambda: engine.document_keys([Document(title="", text="New")]),
        engine.flush,
        engine.clear_cache,
    ]
    for call in calls:
        with pytest.raises(UserError, match="the engine is closed: open another one"):
            call()


def test_an_engine_is_closed_after_an_error(toy_model: Path) -> None:
    with pytest.raises(ZeroDivisionError), load_engine(toy_model) as engine:
        raise ZeroDivisionError
    with pytest.raises(UserError, match="closed"):
        engine.flush()


def test_a_cache_folder_may_be_given_as_a_text(toy_model: Path, tmp_path: Path) -> None:
    with load_engine(toy_model, cache=CacheOptions(folder=str(tmp_path / "blocks"))) as engine:
        engine.generate(**REQUESTS[0], max_new_tokens=1)
    assert list(CacheFolder(tmp_path / "blocks").entries())
