"""Teacher answers in `prepare`, by an endpoint and by a local model: restarts, checks, counts, refusals."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from blockft.config.choices import BadRecordPolicy, Format, Response, TooLongPolicy
from blockft.config.recipe import dump_recipe
from blockft.config.settings import PromptSettings, Source, TeacherSettings
from blockft.data import teacher_endpoint
from blockft.data.prepared import load_prepared
from blockft.data.sample import Sample, sample_to_record
from blockft.errors import UserError
from blockft.inference.engine import Engine
from blockft.stages.prepare import prepare
from tests.data.toys import rag_sample
from tests.endpoint import Reply, Server, completion, endpoint, error
from tests.run import save_model
from tests.stages.test_prepare import Make, files, samples_of

KEY = "sk-secret-1234567890"
TEACHER = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_endpoint, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(teacher_endpoint, "MAX_WAIT_S", 0.002)


def save(path: Path, samples: Sequence[Sample]) -> Source:
    path.write_text("".join(json.dumps(sample_to_record(sample)) + "\n" for sample in samples))
    return Source(format=Format.samples, path=str(path), response=Response.teacher)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Twelve samples with ten different questions."""
    samples = [rag_sample(f"Question {i % 10}?", id=f"s{i}") for i in range(12)]
    return save(tmp_path / "asked.jsonl", samples)


def answer_question(text: str, before: int) -> Reply:
    (number,) = re.findall(r"Question (\d+)\?", text)
    return Reply(body=completion(f" The fox number {number}.\n"))


@pytest.fixture
def server() -> Iterator[Server]:
    with endpoint(answer_question) as running:
        yield running


def teacher(server: Server, **settings: Any) -> TeacherSettings:
    return TeacherSettings(model="m", base_url=server.base_url, **settings)


def answers_file(out: Path) -> Path:
    return out.with_name("set.answers.jsonl")


def entry(out: Path, index: int = 0) -> Any:
    return load_prepared(out).manifest["sources"][index]


def test_a_source_learns_the_answers_of_its_teacher(
    make_recipe: Make, source: Source, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare(make_recipe(sources=[source], teacher=teacher(server)))
    samples = samples_of(out)
    assert [s.response for s in samples] == [f"The fox number {i % 10}." for i in range(12)]
    assert all(s.answers == ("The fox",) and s.meta["response_by"] == "teacher" for s in samples)
    assert len(server.asked) == 10 and set(server.asked.values()) == {1}, "equal questions are asked once"
    _, request = server.requests[0]
    assert re.fullmatch(r"Answer.\n\nOne.\n\nTwo.\n\nQuestion \d\?", request["messages"][0]["content"])
    assert entry(out)["teacher"] == {
        "questions": 10,
        "answered": 10,
        "prompt_tokens": 70,
        "answer_tokens": 30,
    }
    assert len(answers_file(out).read_bytes().splitlines()) == 10
    assert "10 new answers, 70 prompt tokens and 30 answer tokens" in capsys.readouterr().err


def test_gold_sources_beside_it_are_not_asked(make_recipe: Make, source: Source, server: Server) -> None:
    gold = source.model_copy(update={"response": Response.gold})
    out = prepare(make_recipe(sources=[gold, source], teacher=teacher(server)))
    assert [s.response for s in samples_of(out)][:12] == ["The fox"] * 12
    assert "teacher" not in entry(out) and entry(out, 1)["teacher"]["answered"] == 10


def test_a_second_prepare_asks_only_new_questions(
    make_recipe: Make, source: Source, server: Server, tmp_path: Path
) -> None:
    recipe = make_recipe(sources=[source], teacher=teacher(server))
    content = answers_file(prepare(recipe)).read_bytes()
    prepare(recipe, overwrite=True)
    assert (
        sum(server.asked.values()) == 10
        and answers_file(Path(recipe.data.output_dir)).read_bytes() == content
    )
    more = save(tmp_path / "more.jsonl", [rag_sample(f"Question {i}?", id=f"m{i}") for i in range(8, 15)])
    prepare(make_recipe(sources=[more, source], teacher=teacher(server)), overwrite=True)
    assert len(server.asked) == 15 and set(server.asked.values()) == {1}


def test_another_address_serves_the_same_answers_and_another_model_does_not(
    make_recipe: Make, source: Source, server: Server
) -> None:
    prepare(make_recipe(sources=[source], teacher=teacher(server)))
    offline = TeacherSettings(**TEACHER, concurrency=3, timeout_s=1, max_retries=0)
    prepare(make_recipe(sources=[source], teacher=offline), overwrite=True)
    for changes in ({"model": "n"}, {"max_new_tokens": 9}, {"temperature": 1}, {"extra_body": {"top_k": 1}}):
        other = offline.model_copy(update=changes)
        with pytest.raises(UserError, match="cannot be reached after 1 request .*; .* keeps 10 answers, and"):
            prepare(make_recipe(sources=[source], teacher=other), overwrite=True)


def test_an_interrupted_prepare_gives_the_bytes_of_one_that_never_was(
    make_recipe: Make, source: Source, tmp_path: Path
) -> None:
    contents = set()
    for concurrency in (1, 8):
        for num_answered in (10, 0, 1, 5, 9):
            answered: list[str] = []

            def respond(
                text: str, before: int, limit: int = num_answered, seen: list[str] = answered
            ) -> Reply:
                if len(seen) >= limit:
                    return Reply(status=401, body=error("stop"))
                seen.append(text)
                return answer_question(text, before)

            folder = tmp_path / f"{concurrency}-{num_answered}"
            with endpoint(respond) as server:
                settings = teacher(server, concurrency=concurrency)
                recipe = make_recipe(sources=[source], teacher=settings, output_dir=str(folder / "set"))
                if num_answered < 10:
                    with pytest.raises(UserError, match="refuses access"):
                        prepare(recipe)
                    assert not (folder / "set").exists()
                    server.respond = answer_question
                out = prepare(recipe)
            found = {text: number for text, number in server.asked.items() if text in answered}
            assert set(found.values()) <= {1}, "no answered question is asked again"
            contents.add((answers_file(out).read_bytes(), *sorted(files(out).items())))
    assert len(contents) == 1


def test_the_teacher_may_read_another_wording(make_recipe: Make, tmp_path: Path, server: Server) -> None:
    lines = [
        {
            "question": f"Question {i}?",
            "answers": [f"number {i}"],
            "ctxs": [{"title": f"T{n}", "text": f"Text {n}.", "score": n} for n in range(i, i + 3)],
        }
        for i in range(6)
    ]
    path = tmp_path / "fid.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompt = PromptSettings(instruction="Read.", document="\n\n[{title}]", question="\n\n{question} Or NONE.")
    source = Source(format=Format.fid, path=str(path), response=Response.teacher_with_gold)
    settings = teacher(
        server, prompt=prompt.model_copy(update={"document": "\n\n[{title}: {text}]"}), no_answer="NONE"
    )
    out = prepare(make_recipe(sources=[source], teacher=settings, num_documents=2, order="shuffled"))
    texts = sorted(server.asked)
    assert re.fullmatch(r"Read.\n\n\[T\d: Text \d.\]\n\n\[T\d: Text \d.\]\n\nQuestion 0\? Or NONE.", texts[0])
    for sample in samples_of(out):
        documents = re.findall(r"T\d", "".join(sample.blocks))
        (asked,) = [text for text in texts if re.findall(r"Question \d", text)[0] in sample.blocks[-1]]
        assert re.findall(r"T\d", asked) == documents, "the same documents in the same order"
        assert "Answer in a few words." in sample.blocks[-1]
        assert sample.response == f"The fox {sample.answers[0]}."


def test_the_teacher_is_told_what_to_write_without_an_answer(
    make_recipe: Make, source: Source, server: Server
) -> None:
    server.respond = lambda text, before: (
        Reply(body=completion("Not found.")) if "Question 3?" in text else answer_question(text, before)
    )
    out = prepare(make_recipe(sources=[source], teacher=teacher(server, no_answer="NOT FOUND")))
    assert all(
        text.endswith("?\nIf the documents do not contain the answer, write only: NOT FOUND")
        for text in server.asked
    )
    assert entry(out)["dropped"] == {"teacher finds no answer in the documents": 1}
    assert entry(out)["kept"] == 11 and "Not found" not in str(samples_of(out))


MARKED = ["<thinking>A fox?</thinking> The fox", "[THINK]A fox?[/THINK]The fox", "A fox?</seed:think>The fox"]


@pytest.mark.parametrize("text", MARKED)
def test_reasoning_in_the_marks_of_other_models_is_dropped(
    make_recipe: Make, source: Source, server: Server, text: str
) -> None:
    server.respond = lambda _, before: Reply(body=completion(text))
    with pytest.raises(UserError, match=r"contains its reasoning: 12\): turn it off"):
        prepare(make_recipe(sources=[source], teacher=teacher(server)))


DROPS = {
    "teacher answer is empty": Reply(body=completion(" \n")),
    "teacher answer contains its reasoning": Reply(body=completion("<think>A fox?</think> The fox")),
    "teacher answer is cut off": Reply(body=completion("The fox number", "length")),
    "teacher refuses to answer": Reply(body=completion("", "content_filter")),
    "teacher answer is no text": Reply(body=completion(None, "tool_calls")),
    "prompt too long for the teacher": Reply(status=400, body=error("maximum context length is 9")),
}


@pytest.mark.parametrize("response", [Response.teacher, Response.teacher_with_gold])
@pytest.mark.parametrize("reason", DROPS)
def test_an_answer_that_cannot_be_learnt_is_dropped_and_counted(
    make_recipe: Make, source: Source, server: Server, reason: str, response: Response
) -> None:
    server.respond = lambda text, before: (
        DROPS[reason] if "Question 1?" in text else answer_question(text, before)
    )
    source.response = response
    recipe = make_recipe(sources=[source], teacher=teacher(server))
    out = prepare(recipe)
    assert entry(out)["dropped"] == {reason: 2} and entry(out)["kept"] == 10
    prepare(recipe, overwrite=True)
    assert sum(server.asked.values()) == 10, "what the teacher refused is not asked again"


def test_an_answer_without_a_gold_answer_is_dropped(
    make_recipe: Make, source: Source, server: Server
) -> None:
    server.respond = lambda text, before: (
        Reply(body=completion("A dog")) if "Question 4?" in text else answer_question(text, before)
    )
    source.response = Response.teacher_with_gold
    out = prepare(make_recipe(sources=[source], teacher=teacher(server)))
    assert entry(out)["dropped"] == {"teacher answer without a gold answer": 1}
    assert len(samples_of(out)) == 11


def test_what_one_source_drops_is_not_listed_for_another_one_that_reads_the_same_file(
    make_recipe: Make, source: Source, server: Server
) -> None:
    server.respond = lambda text, before: Reply(body=completion("A dog"))
    strict = source.model_copy(update={"response": Response.teacher_with_gold})
    gold = source.model_copy(update={"response": Response.gold})
    recipe = make_recipe(sources=[strict, gold], teacher=teacher(server))
    contents = [files(prepare(recipe, overwrite=True)) for _ in range(2)]
    assert contents[0] == contents[1]
    manifest = json.loads(contents[0]["manifest.json"])
    assert [bool(entry["drop_examples"]) for entry in manifest["sources"]] == [True, False]


def test_a_question_that_fails_stops_or_is_skipped_and_asked_again(
    make_recipe: Make, source: Source, server: Server
) -> None:
    server.respond = lambda text, before: (
        Reply(status=500, body=error("broken")) if "Question 2?" in text else answer_question(text, before)
    )
    settings = teacher(server, max_retries=1, concurrency=1)
    with pytest.raises(
        UserError, match=r"after 2 requests \(500: broken\) \(data.on_bad_record=skip .*; .* keeps 2 answers"
    ):
        prepare(make_recipe(sources=[source], teacher=settings))
    recipe = make_recipe(sources=[source], teacher=settings, on_bad_record=BadRecordPolicy.skip)
    out = prepare(recipe)
    assert entry(out)["dropped"] == {"teacher has not answered": 1}
    assert entry(out)["bad_records"] == [
        "sample s2: the teacher has not answered after 2 requests (500: broken)"
    ]
    server.respond = answer_question
    prepare(recipe, overwrite=True)
    assert entry(out)["dropped"] == {} and sum(server.asked.values()) == 9 + 2 + 2 + 1


def test_chats_are_answered_in_their_last_turn(make_recipe: Make, tmp_path: Path, server: Server) -> None:
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", "Question 7?"), ("assistant", "Gold")]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    source = Source(format=Format.messages, path=str(path), response=Response.teacher)
    server.respond = lambda text, before: Reply(body=completion(f"answer to {text}"))
    out = prepare(make_recipe(sources=[source], teacher=teacher(server, no_answer="NONE")))
    assert [s.response for s in samples_of(out)] == ["answer to Hello", "answer to Question 7?"]
    contents = [[m["content"] for m in request["messages"]] for _, request in server.requests]
    assert sorted(contents, key=len) == [["Hello"], ["Hello", "Hi", "Question 7?"]]


def test_a_key_appears_nowhere(
    make_recipe: Make,
    source: Source,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    recipe = make_recipe(sources=[source], teacher=teacher(server, api_key_env="TEACHER_KEY"))
    server.respond = lambda text, before: Reply(status=401, body=error(f"wrong key {KEY}"))
    with pytest.raises(UserError, match=r"wrong key \*\*\*") as caught:
        prepare(recipe)
    server.respond = answer_question
    prepare(recipe)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    shown = "".join(capsys.readouterr())
    assert KEY not in f"{caught.value}{shown}{dump_recipe(recipe)}" and KEY.encode() not in written
    assert server.base_url.encode() not in written, "an address may be private, and decides no answer"
    assert {headers["authorization"] for headers, _ in server.requests} == {f"Bearer {KEY}"}


@pytest.mark.parametrize("key", [None, "", "two words", "line\n", "schlüssel"])
def test_a_key_that_is_missing_or_malformed_is_refused_without_showing_it(
    make_recipe: Make, source: Source, server: Server, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    name = "sk_a_key_that_looks_like_a_variable"
    if key is not None:
        monkeypatch.setenv(name, key)
    with pytest.raises(UserError, match="that data.teacher.api_key_env names") as caught:
        prepare(make_recipe(sources=[source], teacher=teacher(server, api_key_env=name)))
    assert name not in str(caught.value) and not (key and key in str(caught.value))
    assert not server.asked


def refuse(make_recipe: Make, message: str, source: Source, settings: Any, **data: Any) -> None:
    given = TeacherSettings(**settings) if settings is not None else None
    with pytest.raises(UserError, match=message):
        prepare(make_recipe(sources=[source], teacher=given, **data))


def test_settings_that_contradict_each_other_are_refused(
    make_recipe: Make, source: Source, tmp_path: Path
) -> None:
    refuse(make_recipe, r"data.sources\[0\].response is teacher, but data.teacher is null", source, None)
    refuse(make_recipe, "too_long is trim", source, TEACHER, too_long=TooLongPolicy.trim)
    refuse(make_recipe, "revision is 'v1'", source, TEACHER | {"revision": "v1"})
    refuse(make_recipe, "api_key_env is set, but", source, {"model": "m", "api_key_env": "A"})
    refuse(make_recipe, "extra_body sets n,", source, TEACHER | {"extra_body": {"n": 2}})
    refuse(make_recipe, "manifest would hold", source, TEACHER | {"extra_body": {"api_key": "s"}})
    refuse(make_recipe, "no_answer is 'the'", source, TEACHER | {"no_answer": "the"})
    wordless = {"prompt": {"question": "Answer."}}
    refuse(make_recipe, "data.teacher.prompt.question lacks the field", source, TEACHER | wordless)
    inside = str(tmp_path / "out" / "set" / "a.jsonl")
    refuse(make_recipe, "inside of data.output_dir", source, TEACHER | {"answers_file": inside})
    for path in (source.path, str(Path(source.path).parent), f"{Path(source.path).parent}/*.jsonl"):
        answers = str(Path(source.path).with_name("a.jsonl")) if path != source.path else path
        read = source.model_copy(update={"path": path})
        refuse(
            make_recipe, "is a source file of data.sources.0.path", read, TEACHER | {"answers_file": answers}
        )
    chats = Source(format=Format.alpaca, path=source.path, response=Response.teacher_with_gold)
    refuse(make_recipe, "no gold answers", chats, TEACHER)
    blocks = Source(format=Format.blocks, path=source.path, response=Response.teacher)
    refuse(make_recipe, "already contain the chat template", blocks, TEACHER)


def test_a_templated_sample_is_refused_or_dropped(make_recipe: Make, tmp_path: Path, server: Server) -> None:
    templated = Sample(id="t", source="toy", templated=("<|im_start|>user\n", "Q<|im_end|>"), response="r")
    source = save(tmp_path / "mixed.jsonl", [templated, rag_sample("Question 1?", id="q")])
    with pytest.raises(UserError, match="sample t of .* already contains a chat template"):
        prepare(make_recipe(sources=[source], teacher=teacher(server)))
    skip = BadRecordPolicy.skip
    out = prepare(make_recipe(sources=[source], teacher=teacher(server), on_bad_record=skip))
    assert [s.id for s in samples_of(out)] == ["q"]
    assert entry(out)["dropped"] == {"prompt already contains a chat template": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TEACHER | {"batch_size": 2}, "batch_size has no effect: the teacher is an endpoint"),
        (TEACHER | {"prompt": {"instruction": "Read."}}, "data.teacher.prompt has no effect"),
    ],
)
def test_settings_without_effect_give_a_warning(
    make_recipe: Make,
    source: Source,
    server: Server,
    capsys: pytest.CaptureFixture[str],
    settings: Any,
    message: str,
) -> None:
    given = TeacherSettings(**settings | {"base_url": server.base_url})
    prepare(make_recipe(sources=[source], teacher=given))
    assert message in capsys.readouterr().err


def test_a_teacher_without_a_source_gives_a_warning(
    make_recipe: Make, source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    source.response = Response.gold
    prepare(make_recipe(sources=[source], teacher=TeacherSettings(**TEACHER)))
    assert "data.teacher has no effect" in capsys.readouterr().err


def test_two_writers_of_one_answers_file_are_refused(
    make_recipe: Make, source: Source, server: Server, tmp_path: Path
) -> None:
    shared, refused = str(tmp_path / "shared.jsonl"), []

    def respond(text: str, before: int) -> Reply:
        if not refused:
            other = make_recipe(
                sources=[source],
                teacher=teacher(server, answers_file=shared),
                output_dir=str(tmp_path / "other"),
            )
            with pytest.raises(UserError, match="shared.jsonl is being written by process"):
                prepare(other)
            refused.append(True)
        return answer_question(text, before)

    server.respond = respond
    prepare(make_recipe(sources=[source], teacher=teacher(server, answers_file=shared, concurrency=1)))
    assert refused and len(Path(shared).read_bytes().splitlines()) == 10


# --- a local model


@pytest.fixture(scope="module")
def local_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("teacher"), initializer_range=0.3)


@pytest.fixture
def local_source(tmp_path: Path) -> Source:
    samples = [
        rag_sample(f"Question {i}?", ("Fox " * (i % 7 + 1) + ".\n\n",), id=f"s{i}", source="toy")
        for i in range(20)
    ]
    return save(tmp_path / "asked.jsonl", samples)


def with_gold(source: Source) -> list[Source]:
    """Return the source, and the same with its gold responses: answers of random weights rarely end."""
    return [source, source.model_copy(update={"response": Response.gold})]


def test_a_local_model_answers_in_full_mode(
    make_recipe: Make, local_model: Path, local_source: Source
) -> None:
    settings = TeacherSettings(model=str(local_model), max_new_tokens=6, batch_size=4)
    out = prepare(make_recipe(sources=with_gold(local_source), teacher=settings, num_workers=2))
    lines = [json.loads(line) for line in answers_file(out).open()]
    assert len(lines) == 20
    with Engine.load(local_model) as engine:
        for sample in (rag_sample(f"Question {i}?", ("Fox " * (i % 7 + 1) + ".\n\n",)) for i in range(20)):
            answer = engine.generate_batch([sample], mode="full", max_new_tokens=6)[0]
            assert (answer.text, len(answer.ids)) in [
                (line["answer"], line["answer_tokens"]) for line in lines
            ]


def test_a_local_model_that_is_interrupted_answers_as_one_that_never_was(
    make_recipe: Make,
    local_model: Path,
    local_source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = TeacherSettings(model=str(local_model), max_new_tokens=3, batch_size=3)
    generate_ids, contents = Engine.generate_ids, set()
    for stop in (99, 0, 1, 4, 6):
        num_batches, num_asked = 0, 0

        def interrupted(self: Engine, prompts: Any, **options: Any) -> Any:
            nonlocal num_batches, num_asked
            num_batches += 1
            if num_batches == stop + 1:  # noqa: B023
                raise KeyboardInterrupt
            num_asked += len(prompts)
            return generate_ids(self, prompts, **options)

        monkeypatch.setattr(Engine, "generate_ids", interrupted)
        recipe = make_recipe(
            sources=with_gold(local_source), teacher=settings, output_dir=str(tmp_path / f"{stop}" / "set")
        )
        if stop < 99:
            with pytest.raises(KeyboardInterrupt):
                prepare(recipe)
        out = prepare(recipe)
        assert num_asked == 20
        contents.add((answers_file(out).read_bytes(), *sorted(files(out).items())))
    assert len(contents) == 1
