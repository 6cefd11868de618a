"""Evaluations: of data alone, killed and continued; one block is full attention."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockft.config.settings import PromptSettings
from blockft.errors import UserError
from blockft.evaluation import answers
from blockft.stages.evaluate import evaluate
from blockft.stages.questions import read_questions, recipe_for_questions
from tests.run import save_model, save_samples

ROOT = Path(__file__).parents[2]
MODEL = "data/demo/model"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    save_model(folder / "model")
    save_samples(folder / "questions.jsonl", 21)
    return folder


def run(toy: Path, out: str, *overrides: str, data: str = "questions.jsonl") -> Path:
    words = (f"eval.output_dir={toy / out}", "eval.max_new_tokens=4", "eval.batch_size=4", *overrides)
    return evaluate(str(toy / "model"), recipe_for_questions(str(toy / "model"), str(toy / data), words))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_need_not_say_how_questions_are_worded(toy: Path, tmp_path: Path) -> None:
    config = json.loads((toy / "model" / "config.json").read_text())
    config["block_attention"] = {"version": 1, "position_scheme": "local"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    questions = tmp_path / "questions.json"
    questions.write_text("[]")
    plain, export = (
        recipe_for_questions(str(model), str(questions), format="hotpotqa")
        for model in (toy / "model", tmp_path)
    )
    assert export.data.prompt == plain.data.prompt


def test_data_alone_are_scored_in_both_modes(toy: Path) -> None:
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


def test_questions_that_are_left_out_are_counted(toy: Path) -> None:
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
    said = capsys.readouterr().err
    assert f"left out as too long: {8 - kept} of 8; prompt q3: " in said and "shorten its question" in said


def test_an_evaluation_of_nothing_but_long_questions_is_refused(toy: Path) -> None:
    with pytest.raises(UserError, match="no question fits: prompt q0: .* fewer new tokens"):
        run(toy, "none", "eval.max_new_tokens=4096")
    assert not list(toy.glob("*none*"))


def test_unfit_questions_are_skipped_if_bad_records_are(toy: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("m.content", "m.content | trim"))
    records = [json.loads(line) for line in (toy / "questions.jsonl").read_text().splitlines()[:3]]
    records[1] |= {"messages": [{"role": "user", "content": ["\na=1", "a?"]}], "meta": {"documents": [0]}}
    data = tmp_path / "unfit.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["eval.max_new_tokens=2", f"eval.output_dir={tmp_path / 'out'}", "eval.modes=[block]"]
    with pytest.raises(UserError, match="sample q1 of toy: .* trims the user message"):
        evaluate(str(model), recipe_for_questions(str(model), str(data), words))
    recipe = recipe_for_questions(str(model), str(data), [*words, "data.on_bad_record=skip"])
    options = json.loads((evaluate(str(model), recipe) / "report.json").read_text())["options"]
    assert options["questions"] == 2
    assert options["records dropped"] == {"document trimmed by the chat template": 1}


def test_positions_are_those_of_the_model(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(toy, "local", "data.positions=local", "eval.modes=[block]", "eval.max_samples=2")
    options = json.loads((report / "report.json").read_text())["options"]
    assert options["positions of blocks"] == "reencoded"
    assert "data.positions=local has no effect" in capsys.readouterr().err


def test_a_table_of_eighty_columns_breaks_no_word(
    toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run(toy, "table")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    words = {word for line in lines for word in line.split()}
    assert {"number", "substring", "match", "exact", "token", "f1"} <= words


def test_answers_do_not_depend_on_the_batches(toy: Path) -> None:
    one, many = run(toy, "one", "eval.batch_size=1"), run(toy, "many", "eval.batch_size=8")
    for mode in ("block", "full"):
        assert contents(one)[f"predictions-{mode}.jsonl"] == contents(many)[f"predictions-{mode}.jsonl"]


def test_one_block_is_answered_alike_in_both_modes(toy: Path) -> None:
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


def test_an_evaluation_that_failed_goes_on(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, calls = contents(run(toy, "never")), []

    def failing(*given: object, **named: object) -> list[answers.AnswerRecord]:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return asked(*given, **named)  # type: ignore[arg-type]

    asked = answers.answer_batch
    monkeypatch.setattr("blockft.stages.evaluate.answer_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        run(toy, "failed")
    assert "the same command goes on" in capsys.readouterr().err
    assert not (toy / "failed").exists()
    with pytest.raises(UserError, match="output limit, tokens: 4, not 3"):
        run(toy, "failed", "eval.max_new_tokens=3")
    with pytest.raises(UserError, match="questions: 21, not 20"):
        run(toy, "failed", "eval.max_samples=20")
    # model, data and folder by other names
    again = f"{toy}/../{toy.name}"
    recipe = recipe_for_questions(
        f"{again}/model",
        f"{again}/questions.jsonl",
        [f"eval.output_dir={again}/failed", "eval.max_new_tokens=4", "eval.batch_size=4"],
    )
    goes_on = contents(evaluate(f"{again}/model", recipe))
    assert len(calls) == 4 + 12 - 3, "three batches of twelve were kept"
    for name in ("predictions-block.jsonl", "predictions-full.jsonl"):
        assert goes_on[name] == whole[name]


def test_show_4_an_evaluation_that_was_killed_gives_the_report_of_one_that_was_not(tmp_path: Path) -> None:
    world = [sys.executable, "data/demo/world.py", str(tmp_path / "world"), "--scenes", "1"]
    subprocess.run(world, cwd=ROOT, check=True)
    command = [sys.executable, "-m", "blockft", "eval", MODEL, str(tmp_path / "world" / "heldout.jsonl")]
    command += ["eval.max_samples=48", "eval.batch_size=4", "eval.max_new_tokens=4"]

    def start(out: str) -> subprocess.Popen[bytes]:
        words = [*command, f"eval.output_dir={tmp_path / out}"]
        return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    killed = start("killed")
    kept = tmp_path / ".killed.partial" / "answers-full.jsonl"
    while killed.poll() is None and not (kept.is_file() and kept.stat().st_size):
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "killed").exists()
    assert 0 < len(kept.read_bytes().splitlines()) < 48
    for out in ("killed", "never"):
        _, said = (done := start(out)).communicate()
        assert done.returncode == 0, said
        assert (b"going on after" in said) == (out == "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "never")
    assert not list(tmp_path.glob(".*"))


def test_an_export_is_asked_as_it_was_trained(toy: Path) -> None:
    config = json.loads((toy / "model" / "config.json").read_text())
    wording = {"instruction": "Read.", "document": "\n{text}", "question": "\n{question}"}
    config["block_attention"] = {"order": "descending", "documents_in": "system", "prompt": wording}
    export = save_model(toy / "export")
    (export / "config.json").write_text(json.dumps(config))
    questions = toy / "h.json"
    questions.write_text("[]")
    recipe = recipe_for_questions(str(export), str(questions), format="hotpotqa")
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


@pytest.mark.parametrize("wording", ["today's", "that of exports with separators behind documents"])
def test_the_demo_model_is_asked_questions_of_a_file(tmp_path: Path, wording: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(ROOT / MODEL, model)
    if wording != "today's":
        config = json.loads((model / "config.json").read_text())
        config["block_attention"]["prompt"]["document"] = "{title}\n{text}\n\n"
        (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "h.json").write_text(json.dumps(HOTPOT))
    words = ["eval.max_new_tokens=2", f"eval.output_dir={tmp_path / 'out'}", "eval.modes=[block]"]
    recipe = recipe_for_questions(str(model), str(tmp_path / "h.json"), words, format="hotpotqa")
    report = json.loads((evaluate(str(model), recipe) / "report.json").read_text())
    options = report["options"]
    if wording == "today's":
        assert recipe.data.prompt == PromptSettings(), "as an export of the recipe demo-base"
    assert options["questions"] == 2 and options["message of the documents"] == "user"
    assert options["wording of a document"] == recipe.data.prompt.document
    assert options["sources"][0].keys() >= {"split", "name"}


@pytest.mark.real_data
def test_published_questions_are_counted_by_their_hops(toy: Path) -> None:
    path = Path(os.environ.get("BLOCKFT_REAL_DATA", "../shared/data")) / "hotpotqa_distractor_dev.json"
    if not path.exists():
        pytest.skip(f"{path} is not there (set BLOCKFT_REAL_DATA)")
    samples, dropped = read_questions(recipe_for_questions(str(toy / "model"), str(path), format="hotpotqa"))
    groups = {group for sample in samples for group in answers.question_groups(sample)}
    assert len(samples) == 200 and not dropped
    assert groups == {"hotpotqa", "hotpotqa: bridge", "hotpotqa: comparison", "hotpotqa: hard"}


@pytest.mark.parametrize(
    ("data", "format", "said"),
    [
        ("demmo", None, "did you mean demo"),
        ("no/such.jsonl", None, "neither a file"),
        ("no/such.jsonl", "squad", "does not exist"),
        ("README.md", "csv", "allowed are samples"),
    ],
)
def test_questions_that_are_not_there(toy: Path, data: str, format: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe_for_questions(str(toy / "model"), data, format=format)
