"""`blockft eval`: which questions are asked, what the report holds, and how an evaluation resumes."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from blockft.cli.commands import app
from blockft.config.choices import MethodName
from blockft.config.recipe import build_recipe
from blockft.config.settings import PromptSettings, Recipe
from blockft.errors import UserError
from blockft.evaluation import answer_questions
from blockft.evaluation.report import Prediction, build_report
from blockft.stages import evaluate as stage
from blockft.stages.evaluate import (
    evaluate,
    evaluation_recipe,
    model_revision,
    print_report,
    read_questions,
)
from tests.commands import Ranks, start_ranks
from tests.hold import Hold
from tests.readmes import save_export
from tests.run import save_model, save_samples, write_block_attention

ROOT = Path(__file__).parents[2]
MODEL = "data/demo/model"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    save_model(folder / "model")
    save_samples(folder / "questions.jsonl", 21)
    return folder


def run(toy: Path, out: str, *overrides: str, data: str = "questions.jsonl") -> Path:
    """Evaluate the toy model and return the folder of the report."""
    settings = (f"eval.output_dir={toy / out}", "eval.max_new_tokens=4", "eval.batch_size=4", *overrides)
    report = evaluate(str(toy / "model"), str(toy / data), overrides=settings)
    assert report == json.loads((toy / out / "report.json").read_text())
    return toy / out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_a_model_that_is_no_export_gets_the_default_wording(toy: Path, tmp_path: Path) -> None:
    config = json.loads((toy / "model" / "config.json").read_text())
    config["block_attention"] = {"version": 1, "position_scheme": "local"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    questions = tmp_path / "questions.json"
    questions.write_text("[]")
    plain = evaluation_recipe(str(toy / "model"), str(questions), format="hotpotqa")
    assert plain.data.prompt == PromptSettings()
    with pytest.raises(UserError, match=r"without a wording for documents .* set data\.prompt\.instruction"):
        evaluation_recipe(str(tmp_path), str(questions), format="hotpotqa")
    override = "data.prompt.instruction=Read."
    given = evaluation_recipe(str(tmp_path), str(questions), format="hotpotqa", overrides=[override])
    assert given.data.prompt.instruction == "Read."


def test_questions_without_a_recipe_are_scored_in_both_modes(toy: Path) -> None:
    out = run(toy, "both")
    report = json.loads((out / "report.json").read_text())
    assert set(report["modes"]) == {"block", "full"} and report["modes"]["full"]["all"]["questions"] == 21
    options = report["options"]
    assert options["output limit, tokens"] == 4 and options["order of documents"] == "as in the samples"
    assert sum(options["documents per prompt"].values()) == 21
    assert sum(report["prompts"]["block"]["blocks_per_prompt"].values()) == 21
    assert report["prompts"]["full"]["blocks_per_prompt"] == {"1": 21}
    ids = [json.loads(line)["id"] for line in (out / "predictions-full.jsonl").read_text().splitlines()]
    assert ids == [f"q{i}" for i in range(21)]
    assert {p.name for p in out.iterdir()} == {
        "report.json",
        "report.md",
        "report.png",
        "predictions-block.jsonl",
        "predictions-full.jsonl",
    }
    assert not list(toy.glob(".both*"))


def test_bad_records_are_counted(toy: Path) -> None:
    lines = (toy / "questions.jsonl").read_text().splitlines()
    (toy / "faulty.jsonl").write_text("\n".join([*lines[:3], "{}", lines[3]]))
    with pytest.raises(UserError, match="line 4"):
        run(toy, "faulty", data="faulty.jsonl")
    report = run(toy, "skipped", "data.on_bad_record=skip", data="faulty.jsonl") / "report.json"
    options = json.loads(report.read_text())["options"]
    assert options["questions"] == 4 and options["records dropped"] == {"bad record": 1}


def long_questions(toy: Path) -> Path:
    """Eight questions; the fourth is itself too long for the model, the sixth has a document that is."""
    records = [json.loads(line) for line in (toy / "questions.jsonl").read_text().splitlines()[:8]]
    records[3]["messages"][0]["content"][-1] = "d?" * 2500
    records[5]["messages"][0]["content"][1] = "d" * 5000
    meta = records[5]["meta"]
    meta["relevance"] = list(range(len(meta["documents"])))
    path = toy / "long.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(("too_long", "kept", "trimmed"), [("drop", 6, 0), ("trim", 7, 1)])
def test_questions_that_are_too_long_are_left_out_before_the_first_answer(
    toy: Path, capsys: pytest.CaptureFixture[str], too_long: str, kept: int, trimmed: int
) -> None:
    data = long_questions(toy).name
    out = run(toy, too_long, f"data.too_long={too_long}", "eval.modes=[block]", data=data)
    options = json.loads((out / "report.json").read_text())["options"]
    assert (options["questions"], options["prompts trimmed"]) == (kept, trimmed)
    assert options["records dropped"] == {"too long": 8 - kept}
    assert options["prompts that are too long"] == too_long
    remark = capsys.readouterr().err
    assert f"{8 - kept} of 8 questions are too long and left out; the first: prompt q3: " in remark
    assert "shorten its question" in remark


def test_an_evaluation_of_nothing_but_long_questions_is_refused(toy: Path) -> None:
    with pytest.raises(UserError, match="no question fits into the model: prompt q0: .* fewer new tokens"):
        run(toy, "none", "eval.max_new_tokens=4096")
    assert not list(toy.glob("*none*"))


def test_on_bad_record_skip_leaves_out_questions_that_the_template_changes(toy: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("m.content", "m.content | trim"))
    records = [json.loads(line) for line in (toy / "questions.jsonl").read_text().splitlines()[:3]]
    records[1] |= {"messages": [{"role": "user", "content": ["\na=1", "a?"]}], "meta": {"documents": [0]}}
    data = tmp_path / "unfit.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = ["eval.max_new_tokens=2", f"eval.output_dir={tmp_path / 'out'}", "eval.modes=[block]"]
    with pytest.raises(UserError, match="sample q1 of toy: .* trims the user message"):
        evaluate(str(model), str(data), overrides=settings)
    options = evaluate(str(model), str(data), overrides=[*settings, "data.on_bad_record=skip"])["options"]
    assert options["questions"] == 2
    assert options["records dropped"] == {"document trimmed by the chat template": 1}


def test_a_base_model_is_asked_with_the_template_of_its_recipe(toy: Path, tmp_path: Path) -> None:
    template = toy / "model" / "chat_template.jinja"
    other = tmp_path / "other.jinja"
    other.write_text("{{ raise_exception('no such roles') }}" + template.read_text())
    with pytest.raises(UserError, match="no such roles"):
        run(toy, "templated", f"model.chat_template={other}")
    # the template belongs to the model of the recipe alone
    other_model = ("model.path=another", f"model.chat_template={other}", "eval.max_samples=2")
    run(toy, "other-model", *other_model)


def test_positions_follow_the_model_not_the_recipe(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(toy, "local", "data.positions=local", "eval.modes=[block]", "eval.max_samples=2")
    options = json.loads((report / "report.json").read_text())["options"]
    assert options["positions of blocks"] == "reencoded"
    assert "data.positions=local has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("answers", [("Paris", "Paris"), ("Rome", "Paris")])
def test_the_table_fits_80_columns_and_breaks_no_score(
    answers: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    kinds = ("2wikimultihopqa: bridge_comparison", "2wikimultihopqa: inference")
    predictions = {
        mode: [
            Prediction(str(i), answer, ("Paris",), ("2wikimultihopqa", kinds[i % 2]), 3, 20, 1, False)
            for i in range(4)
        ]
        for mode, answer in zip(("block", "full"), answers, strict=True)
    }
    print_report(build_report("m", predictions, {}))
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    assert {"questions", "substring", "match", "word", "exact", "token", "f1"} <= set(table.split())
    # three groups, each with four scores and their two bounds, in two modes and their difference
    numbers = Counter(float(number) for number in re.findall(r"[-+]?\d+\.\d", table))
    block, full, difference = [(100, 100, 0), (0, 100, -100)][answers[0] == "Rome"]
    assert numbers == Counter(3 * 12 * [block, full, difference])


def test_answers_do_not_depend_on_the_batches(toy: Path) -> None:
    one, many = run(toy, "one", "eval.batch_size=1"), run(toy, "many", "eval.batch_size=8")
    for mode in ("block", "full"):
        assert contents(one)[f"predictions-{mode}.jsonl"] == contents(many)[f"predictions-{mode}.jsonl"]


def test_prompts_of_one_block_get_the_same_answers_in_both_modes(toy: Path) -> None:
    lines = []
    for line in (toy / "questions.jsonl").read_text().splitlines():
        record = json.loads(line)
        (message,) = record["messages"]
        message["content"] = ["".join(message["content"])]
        lines.append(json.dumps(record | {"meta": {}}))
    (toy / "plain.jsonl").write_text("\n".join(lines))
    out = run(toy, "plain", data="plain.jsonl")
    assert contents(out)["predictions-block.jsonl"] == contents(out)["predictions-full.jsonl"]
    report = json.loads((out / "report.json").read_text())
    assert report["block - full"]["all"]["intervals"]["token_f1"] == [0, 0]


def test_an_interrupted_evaluation_resumes_with_the_same_options_only(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    complete, calls = contents(run(toy, "never")), []

    def interrupt_fourth(*arguments: object, **options: object) -> list[answer_questions.AnswerRecord]:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer_batch(*arguments, **options)  # type: ignore[arg-type]

    answer_batch = answer_questions.answer_batch
    monkeypatch.setattr("blockft.stages.evaluate.answer_batch", interrupt_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(toy, "failed")
    assert "run the same command again to resume" in capsys.readouterr().err
    assert not (toy / "failed").exists()
    with pytest.raises(UserError, match="output limit, tokens: 4, not 3"):
        run(toy, "failed", "eval.max_new_tokens=3")
    with pytest.raises(UserError, match="questions: 21, not 20"):
        run(toy, "failed", "eval.max_samples=20")
    # model, data and folder by other names
    again = f"{toy}/../{toy.name}"
    settings = [f"eval.output_dir={again}/failed", "eval.max_new_tokens=4", "eval.batch_size=4"]
    evaluate(f"{again}/model", f"{again}/questions.jsonl", overrides=settings)
    resumed = contents(toy / "failed")
    assert len(calls) == 4 + 12 - 3, "three batches of twelve were kept"
    for name in ("predictions-block.jsonl", "predictions-full.jsonl"):
        assert resumed[name] == complete[name]


def test_a_damaged_answer_of_an_interrupted_evaluation_is_asked_again(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = contents(run(toy, "undamaged"))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("blockft.stages.evaluate.build_report", fail)
        run(toy, "damaged")
    answers = toy / ".damaged.partial" / "answers-full.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    lines[9] = lines[9].replace('"answer": "', '"answer": "x')
    answers.write_text("".join(lines))
    capsys.readouterr()
    assert contents(run(toy, "damaged")) == complete
    assert (
        "answers-full.jsonl, line 10 is damaged: its question and all later ones" in capsys.readouterr().err
    )


@pytest.mark.parametrize("place", ["answer_batch", "build_report"])
def test_the_report_is_written_though_the_stored_answers_are_removed(
    place: str, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = contents(run(toy, f"kept-{place}"))
    work = getattr(stage, place)

    def remove_and_work(*arguments: object, **options: object) -> object:
        shutil.rmtree(toy / f".removed-{place}.partial")
        return work(*arguments, **options)

    monkeypatch.setattr(stage, place, remove_and_work)
    assert contents(run(toy, f"removed-{place}")) == complete
    assert not list(toy.glob(".removed*"))
    has_warned = "partial was removed by another process: it is written again" in capsys.readouterr().err
    assert has_warned == (place == "answer_batch")


def test_answers_given_before_the_stored_ones_were_removed_are_kept(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    answer_batch = stage.answer_batch

    def remove_second_and_interrupt_fourth(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            shutil.rmtree(toy / ".again.partial")
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer_batch(*arguments, **options)

    monkeypatch.setattr(stage, "answer_batch", remove_second_and_interrupt_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(toy, "again")
    assert contents(run(toy, "again")) == contents(run(toy, "whole"))
    assert len(calls) == 4 + 12 - 3 + 12


def test_a_killed_evaluation_resumes_and_gives_the_report_of_an_uninterrupted_one(tmp_path: Path) -> None:
    world = [sys.executable, "data/demo/world.py", str(tmp_path / "world"), "--scenes", "1"]
    subprocess.run(world, cwd=ROOT, check=True)
    command = ["eval", MODEL, tmp_path / "world" / "heldout.jsonl", "eval.max_samples=48"]
    command += ["eval.batch_size=4", "eval.max_new_tokens=4"]

    def start(out: str, before: Hold | None = None) -> Ranks:
        return start_ranks(*command, f"eval.output_dir={tmp_path / out}", before=before)

    # after the twelve batches of block mode and three of full mode
    hold = Hold(tmp_path / "hold", "blockft.evaluation.answer_questions:AnswerFile.add", call=16)
    process = start("killed", hold)
    hold.wait_until_reached(process.is_alive)
    kept = tmp_path / ".killed.partial" / "answers-full.jsonl"
    process.send_signal(signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL and not (tmp_path / "killed").exists()
    assert len(kept.read_bytes().splitlines()) == 12
    for out in ("killed", "uninterrupted"):
        done = start(out).wait()
        assert done.returncode == 0, done.stderr
        assert ("resuming after" in done.stderr) == (out == "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "uninterrupted")
    assert not list(tmp_path.glob(".*"))


def test_an_export_is_asked_with_the_wording_of_its_training(toy: Path) -> None:
    config = json.loads((toy / "model" / "config.json").read_text())
    wording = {"instruction": "Read.", "document": "\n{text}", "question": "\n{question}"}
    config["block_attention"] = {"order": "descending", "documents_in": "system", "prompt": wording}
    export = save_model(toy / "export")
    (export / "config.json").write_text(json.dumps(config))
    questions = toy / "h.json"
    questions.write_text("[]")
    recipe = evaluation_recipe(str(export), str(questions), format="hotpotqa")
    assert recipe.data.order == "descending" and recipe.data.prompt.documents_in == "system"
    assert recipe.data.prompt.document == "\n{text}" and recipe.eval
    assert recipe.eval.output_dir == f"out/eval/{toy.name}-export-{toy.name}-h"


HOTPOT = [
    {
        "_id": f"h{i}",
        "question": "What is the mayor of Vithumouth?",
        "answer": "Brosuk",
        "context": [["Vithumouth", ["The mayor of Vithumouth is Brosuk."]], ["Oremouth", ["Kell."]]],
        "supporting_facts": [["Vithumouth", 0]],
        "type": "bridge",
        "level": "hard",
    }
    for i in range(2)
]


@pytest.mark.parametrize("wording", ["default", "separators behind documents"])
def test_the_demo_model_answers_questions_of_a_file(tmp_path: Path, wording: str) -> None:
    model = tmp_path / "model"
    save_export(model)
    if wording != "default":
        config = json.loads((model / "config.json").read_text())
        config["block_attention"]["prompt"]["document"] = "{title}\n{text}\n\n"
        (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "h.json").write_text(json.dumps(HOTPOT))
    settings = ["eval.max_new_tokens=2", f"eval.output_dir={tmp_path / 'out'}"]
    recipe = evaluation_recipe(
        str(model), str(tmp_path / "h.json"), overrides=settings, format="hotpotqa", modes=["block"]
    )
    report = evaluate(str(model), recipe)
    options = report["options"]
    if wording == "default":
        assert recipe.data.prompt == PromptSettings()
    assert set(report["modes"]) == {"block"}
    assert options["questions"] == 2 and options["message of the documents"] == "user"
    assert options["wording of a document"] == recipe.data.prompt.document
    assert options["sources"][0].keys() >= {"split", "name"}


@pytest.mark.real_data
def test_published_questions_are_grouped_by_kind(toy: Path) -> None:
    path = Path(os.environ.get("BLOCKFT_REAL_DATA", "../shared/data")) / "hotpotqa_distractor_dev.json"
    if not path.exists():
        pytest.skip(f"{path} is not there (set BLOCKFT_REAL_DATA)")
    samples, dropped = read_questions(evaluation_recipe(str(toy / "model"), str(path), format="hotpotqa"))
    groups = {group for sample in samples for group in answer_questions.question_groups(sample)}
    assert len(samples) == 200 and not dropped
    assert groups == {f"hotpotqa{kind}" for kind in ("", ": bridge", ": comparison", ": hard", ": yes/no")}


@pytest.mark.parametrize(
    ("data", "format", "message"),
    [
        ("demmo", None, "did you mean demo"),
        ("no/such.jsonl", None, "neither a file"),
        ("no/such.jsonl", "squad", "does not exist"),
        ("README.md", "csv", "allowed: samples"),
    ],
)
def test_missing_questions_and_unknown_formats_are_refused(
    toy: Path, data: str, format: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluation_recipe(str(toy / "model"), data, format=format)


# the questions


def save_questions(path: Path, num_questions: int, *, without_answers: tuple[int, ...] = ()) -> str:
    records: list[dict[str, Any]] = [
        {
            "id": str(i),
            "source": path.stem,
            "messages": [{"role": "user", "content": ["?"]}],
            "response": "x",
            "answers": [] if i in without_answers else ["x"],
        }
        for i in range(num_questions)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def recipe_of(paths: list[str], *overrides: str) -> Recipe:
    given = {
        "model": {"path": "owner/base"},
        "data": {"output_dir": "o", "sources": [{"format": "samples", "path": "p"}]},
        "train": {"output_dir": "o"},
        "eval": {"output_dir": "o", "sources": [{"format": "samples", "path": path} for path in paths]},
    }
    return build_recipe(given, overrides, "test")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("8", "aaabbbcc"), ("4", "aabc"), ("11", "aaaaabbbbcc"), ("null", "a" * 10 + "bbbbcc")],
)
def test_max_samples_takes_from_every_source(tmp_path: Path, limit: str, expected: str) -> None:
    paths = [save_questions(tmp_path / f"{name}.jsonl", n) for name, n in (("a", 10), ("b", 4), ("c", 2))]
    samples, _ = read_questions(recipe_of(paths, f"eval.max_samples={limit}"))
    assert "".join(sample.source for sample in samples) == expected
    assert [sample.id for sample in samples if sample.source == "a"] == list("0123456789")[
        : expected.count("a")
    ]


def test_the_default_folder_keeps_the_whole_name_of_the_model(tmp_path: Path) -> None:
    data = save_questions(tmp_path / "dev.v1.jsonl", 1)
    outs = [evaluation_recipe(f"meta/Llama-3.{x}B", data).eval for x in ("1-8", "2-3")]
    names = [Path(out.output_dir).name for out in outs if out]
    assert names == [f"meta-Llama-3.{x}B-{tmp_path.name}-dev.v1" for x in ("1-8", "2-3")]


def test_on_bad_record_skip_leaves_out_questions_without_answers(tmp_path: Path) -> None:
    path = save_questions(tmp_path / "a.jsonl", 5, without_answers=(1, 3))
    with pytest.raises(UserError, match=r"question 1 of a has no answers .*data.on_bad_record=skip"):
        read_questions(recipe_of([path]))
    samples, dropped = read_questions(recipe_of([path], "data.on_bad_record=skip"))
    assert [sample.id for sample in samples] == ["0", "2", "4"] and dropped == {"no answers": 2}
    path = save_questions(tmp_path / "a.jsonl", 2, without_answers=(0, 1))
    with pytest.raises(UserError, match=r"hold no question \(no answers: 2\)"):
        read_questions(recipe_of([path], "data.on_bad_record=skip"))


def test_a_source_without_a_question_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = save_questions(tmp_path / "a.jsonl", 3)
    bad = save_questions(tmp_path / "b.jsonl", 2, without_answers=(0, 1))
    (tmp_path / "c.jsonl").touch()
    read_questions(recipe_of([good, bad, str(tmp_path / "c.jsonl")], "data.on_bad_record=skip"))
    assert capsys.readouterr().err.splitlines() == [
        f"blockft: warning: no question of {bad} is asked (no answers: 2)",
        f"blockft: warning: no question of {tmp_path / 'c.jsonl'} is asked (it holds no samples)",
    ]
    read_questions(recipe_of([good, bad], "data.on_bad_record=skip", "eval.max_samples=1"))
    assert capsys.readouterr().err == ""


def test_chats_are_refused_because_they_hold_no_answers(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": turns}))
    recipe = evaluation_recipe("owner/base", str(tmp_path / "c.jsonl"), format="messages")
    with pytest.raises(UserError, match=r"c\.jsonl has the format messages, which holds no answers"):
        read_questions(recipe)


def test_the_revision_of_another_model_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of([], "model.revision=v2")
    assert model_revision("owner/base", recipe) == "v2"
    assert model_revision(str(tmp_path), recipe) is None, "a folder has none"
    assert model_revision("owner/export", recipe_of([])) is None
    with pytest.raises(
        UserError,
        match="model.revision is 'v2' and belongs to 'owner/base', but the evaluated model is 'owner/export'",
    ):
        model_revision("owner/export", recipe)


def test_the_recorded_wording_is_read_at_the_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load_config(path: str, revision: str | None = None) -> None:
        loaded.append((path, revision))

    monkeypatch.setattr(stage, "load_config", load_config)
    (tmp_path / "h.json").write_text("[]")
    data, overrides = str(tmp_path / "h.json"), ["model.revision=v2"]
    evaluation_recipe("owner/export", data, overrides=overrides, format="hotpotqa")
    assert loaded == [("owner/export", "v2")]


def test_the_modes_of_a_recipe_object_can_be_chosen(toy: Path) -> None:
    recipe = evaluation_recipe(f"{toy}/model", f"{toy}/questions.jsonl", modes=["block", "full"])
    chosen = evaluation_recipe(f"{toy}/model", recipe, modes=["full"])
    assert chosen.eval and chosen.eval.modes == ["full"]
    assert recipe.eval and recipe.eval.modes == ["block", "full"]
    assert chosen.model_copy(update={"eval": recipe.eval}) == recipe
    with pytest.raises(UserError, match="takes neither overrides nor a format"):
        evaluation_recipe(f"{toy}/model", recipe, overrides=["eval.max_new_tokens=2"])


def test_questions_of_any_fields_are_evaluated_with_the_trained_wording(toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.csv.gz"
    path.write_bytes(gzip.compress(b"q,a,passage_1\nWho?,fox,A fox.\nWhat?,,A dog.\n"))
    columns = "eval.sources.0.columns={question: q, answers: a, documents: passage_*}"
    recipe = evaluation_recipe(str(toy / "model"), str(path), format="columns", overrides=[columns])
    samples, dropped = read_questions(recipe)
    assert [sample.answers for sample in samples] == [("fox",)] and dropped == {"no answer": 1}
    assert recipe.eval and Path(recipe.eval.output_dir).name.endswith("-q")


CITIES = [("Vithumouth", "Brosuk"), ("Leithein", "Karode"), ("Pawick", "Sulorn"), ("Tagrith", "Mevan")]


@pytest.fixture(scope="module")
def demo_questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of questions about invented cities, which the demo's model answers with names."""
    path = tmp_path_factory.mktemp("cities") / "questions.jsonl"
    documents = [f"The mayor of {city} is {mayor}.\n" for city, mayor in CITIES]
    lines = []
    for number, (city, mayor) in enumerate(CITIES):
        content = ["Answer from the documents:\n", *documents[: number + 1], f"What is the mayor of {city}?"]
        message = {"role": "user", "content": content}
        record = {
            "id": city,
            "source": "cities",
            "messages": [message],
            "response": mayor,
            "answers": [mayor],
        }
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    return path


def answer_cities(questions: Path, out: Path, *overrides: str, model: str = MODEL) -> dict[str, Any]:
    """Return the answers of the demo's model in each mode, and the options of the report."""
    settings = (f"eval.output_dir={out}", "eval.max_new_tokens=4", "eval.batch_size=3", *overrides)
    report = evaluate(model, str(questions), overrides=settings)
    lines = {mode: (out / f"predictions-{mode}.jsonl").read_text().splitlines() for mode in report["modes"]}
    answers = {mode: [json.loads(line)["answer"] for line in found] for mode, found in lines.items()}
    assert all(any(found) for found in answers.values())
    return {"options": report["options"], "lines": lines, **answers}


@pytest.mark.parametrize(
    "method",
    [
        ["name=mask"],
        ["name=recompute", "share=0.0"],
        ["name=recompute", "share=0.0", "tokens=deviation"],
        ["name=shared-start", "start_tokens=0"],
        ["name=ape", "temperature=1.0", "scale=1.0"],
    ],
    ids=" ".join,
)
def test_methods_without_effect_answer_as_the_block_cache(
    demo_questions: Path, tmp_path: Path, method: list[str]
) -> None:
    expected = answer_cities(demo_questions, tmp_path / "cache")
    got = answer_cities(demo_questions, tmp_path / "method", *(f"eval.method.{option}" for option in method))
    assert got["lines"] == expected["lines"]
    assert got["block"] != got["full"]
    assert expected["options"]["method of block mode"] == "block cache"
    options = {
        "name": got["options"]["method of block mode"],
        **(got["options"]["options of the method"] or {}),
    }
    assert {f"{option}={value}" for option, value in options.items()} >= {*method}


@pytest.fixture(scope="module")
def sees_first(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the demo's model, as if it was trained with blocks that see the first block."""
    folder = tmp_path_factory.mktemp("sees-first") / "model"
    return str(write_block_attention(shutil.copytree(MODEL, folder), local_sees_first=True))


@pytest.mark.parametrize(
    "method",
    [
        ["name=mask"],
        ["name=recompute", "share=0"],
        ["name=recompute", "share=0", "tokens=deviation"],
        ["name=shared-start"],
        ["name=ape", "temperature=1", "scale=1"],
    ],
    ids=" ".join,
)
def test_methods_encode_blocks_behind_the_first_block_if_the_model_was_trained_so(
    demo_questions: Path, sees_first: str, tmp_path: Path, method: list[str]
) -> None:
    overrides = [f"eval.method.{option}" for option in method]
    expected = answer_cities(demo_questions, tmp_path / "cache", model=sees_first)
    got = answer_cities(demo_questions, tmp_path / "method", *overrides, model=sees_first)
    assert got["lines"] == expected["lines"]
    assert got["options"]["blocks see the first block"] is True
    without = answer_cities(demo_questions, tmp_path / "without")
    assert without["block"] != got["block"] and without["full"] == got["full"]
    assert "blocks see the first block" not in without["options"]


def test_the_switch_of_a_recipe_does_not_change_a_model_that_was_trained_without_it(
    demo_questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = answer_cities(demo_questions, tmp_path / "without")
    assert "local_sees_first" not in capsys.readouterr().err
    got = answer_cities(demo_questions, tmp_path / "with", "data.local_sees_first=true")
    assert got["lines"] == expected["lines"] and got["options"] == expected["options"]
    assert "data.local_sees_first=true has no effect" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (["name=local-positions"], r"eval\.method\.name is local-positions, but the model was trained with"),
        (["name=shared-start", "start_tokens=4"], r"eval\.method\.start_tokens is 4, but the model"),
        (["name=shared-start", "start_tokens=0"], r"eval\.method\.start_tokens is 0, but the model"),
        (["name=ape", "start_tokens=1"], r"eval\.method\.start_tokens is 1, but the model"),
    ],
    ids=" ".join,
)
def test_methods_that_hide_the_first_block_are_refused_if_the_model_was_trained_to_see_it(
    demo_questions: Path, sees_first: str, tmp_path: Path, method: list[str], message: str
) -> None:
    overrides = [f"eval.method.{option}" for option in method]
    with pytest.raises(UserError, match=message):
        answer_cities(demo_questions, tmp_path / "out", *overrides, model=sees_first)
    assert not (tmp_path / "out").exists()


def test_every_method_is_evaluated_by_its_command(demo_questions: Path, tmp_path: Path) -> None:
    answers = {}
    for name in MethodName:
        out = tmp_path / name
        arguments = [MODEL, str(demo_questions), f"eval.output_dir={out}", "eval.max_new_tokens=4"]
        result = CliRunner().invoke(app, ["eval", *arguments, "--method", name, "--json"])
        assert result.exit_code == 0, result.output
        options = json.loads(result.stdout)["options"]
        assert options["method of block mode"] == name
        assert options["positions of blocks"] == ("local" if name == "local-positions" else "reencoded")
        answers[name] = (out / "predictions-block.jsonl").read_text()
    assert answers[MethodName.local_positions] != answers[MethodName.mask]
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("tokens", ["first", "deviation"])
def test_recomputation_of_all_tokens_answers_as_full_mode(
    demo_questions: Path, tmp_path: Path, tokens: str
) -> None:
    method = ["eval.method.name=recompute", "eval.method.share=1", f"eval.method.tokens={tokens}"]
    got = answer_cities(demo_questions, tmp_path / "out", *method)
    assert got["block"] == got["full"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["share=0.2"], r"eval\.method\.name"),
        (["name=mask", "share=0.2"], r"eval\.method.* has share, but the method mask takes no options"),
        (["name=ape", "share=0.2"], r"has share, but the method ape takes temperature, scale, start_tokens"),
        (["name=recompute", "layer=1"], r"has a layer, which only tokens: deviation compares"),
        (["name=recompute", "share=1.5"], r"eval\.method\.share"),
        (["name=recompute", "share=nan"], r"eval\.method\.share"),
        (["name=ape", "temperature=0"], r"eval\.method\.temperature"),
        (
            ["name=recompute", "tokens=deviation", "layer=2"],
            r"layer is 2, but the model has the layers 0 to 1",
        ),
        (["name=sinks"], r"eval\.method\.name"),
    ],
    ids=" ".join,
)
def test_options_that_a_method_does_not_take_are_refused(
    toy: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    settings = [f"eval.output_dir={tmp_path / 'out'}", *(f"eval.method.{override}" for override in overrides)]
    with pytest.raises(UserError, match=message):
        evaluate(str(toy / "model"), str(toy / "questions.jsonl"), overrides=settings)
    assert not (tmp_path / "out").exists()


def test_a_method_without_block_mode_is_refused(toy: Path) -> None:
    with pytest.raises(UserError, match="has a method, which computes block mode, but modes lacks block"):
        run(toy, "no-block", "eval.method.name=mask", "eval.modes=[full]")
