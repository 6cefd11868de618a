"""`blockft generate`: answers, reused blocks, the cache folder, and errors before the first answer."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from blockft import progress
from blockft.config.settings import PromptSettings
from blockft.errors import UserError
from blockft.inference.cache_folder import CacheFolder
from blockft.inference.engine import Engine
from blockft.stages.generate import CacheArguments, generate
from tests.commands import blockft, run_ranks
from tests.run import save_model

ROOT = Path(__file__).parents[2]
DOCUMENTS = [{"title": "Foxes", "text": "They are red."}, {"text": "Dogs bark."}, "Cows are large."]
REQUESTS: list[dict[str, Any]] = [
    {"id": "a", "documents": DOCUMENTS, "question": "What barks?"},
    {"documents": DOCUMENTS[1:], "question": "Which animal is large?"},
    {"id": 7, "messages": [{"role": "user", "content": ["Read.\n", "Dogs bark.\n", "What barks?"]}]},
    {"blocks": ["<|user|>one ", "two ", "three?<|end|><|assistant|>"]},
]
SMALL = CacheArguments(host="1MB", device="1MB")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), initializer_range=1.0)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    return write(tmp_path / "requests.jsonl", REQUESTS)


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("\n\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return path


def cached_in(folder: Path, **sizes: str) -> CacheArguments:
    return CacheArguments(folder=folder, **{"host": "1MB", "device": "1MB"} | sizes)


def generate_json(model: Path, source: Path, capsys: pytest.CaptureFixture[str], **given: Any) -> list[Any]:
    generate(str(model), str(source), as_json=True, **{"max_new_tokens": 6, "cache": SMALL} | given)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_json_lines_hold_answers_and_reused_blocks(
    model: Path, requests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = generate_json(model, requests, capsys)
    assert [line["id"] for line in lines] == ["a", f"{requests}, line 3", "7", f"{requests}, line 7"]
    first, second, *_ = lines
    assert set(first) == {
        "id",
        "answer",
        "answer_ids",
        "blocks",
        "prompt_tokens",
        "sources",
        "blocks_reused",
        "tokens_reused",
        "ttft_ms",
        "tokens_per_s",
    }
    assert first["sources"] == {"computed": 5} and first["blocks_reused"] == first["tokens_reused"] == 0
    assert first["blocks"] == 6 and len(first["answer_ids"]) <= 6 and first["ttft_ms"] > 0
    assert second["sources"] == {"host": 4} and 0 < second["tokens_reused"] < second["prompt_tokens"]


def test_the_plain_output_has_the_texts_of_the_json_and_a_summary_on_stderr(
    model: Path, requests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [line["answer"] for line in generate_json(model, requests, capsys)]
    generate(str(model), str(requests), max_new_tokens=6, cache=SMALL)
    out, err = capsys.readouterr()
    assert out == "".join(text + "\n" for text in texts)
    assert err.startswith("4 answers; 5 of 14 context blocks reused (5 from the host), ")
    assert "median time to first token" in err


@pytest.mark.parametrize("given", [{}, {"mode": "full"}, {"temperature": 5.0, "top_p": 0.9, "seed": 3}])
@pytest.mark.parametrize("batch_size", [3, 10])
def test_the_batch_size_changes_no_answer(
    model: Path,
    requests: Path,
    capsys: pytest.CaptureFixture[str],
    given: dict[str, Any],
    batch_size: int,
) -> None:
    alone = generate_json(model, requests, capsys, **given)
    together = generate_json(model, requests, capsys, **given, batch_size=batch_size)
    for a, b in zip(alone, together, strict=True):
        assert (a["id"], a["answer_ids"], a["answer"]) == (b["id"], b["answer_ids"], b["answer"])


def test_streaming_prints_the_same_texts(
    model: Path, requests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [line["answer"] for line in generate_json(model, requests, capsys, stop=["e"], max_new_tokens=20)]
    generate(str(model), str(requests), stream=True, max_new_tokens=20, stop=["e"], cache=SMALL)
    out, err = capsys.readouterr()
    rest = out
    for text in texts:
        assert rest.lstrip().startswith(text)
        rest = rest.lstrip()[len(text) :]
    assert not rest.strip() and err.startswith("4 answers")


def test_an_empty_answer_is_named_in_plain_output_only(
    model: Path, requests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first_letters = {line["answer"][0] for line in generate_json(model, requests, capsys) if line["answer"]}
    options: dict[str, Any] = {"stop": sorted(first_letters), "max_new_tokens": 6}
    assert {line["answer"] for line in generate_json(model, requests, capsys, **options)} == {""}
    for stream in (False, True):
        generate(str(model), str(requests), stream=stream, cache=SMALL, **options)
        assert capsys.readouterr().out == 4 * "(empty answer)\n"


def test_a_terminal_shows_progress(
    model: Path, requests: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(str(model), str(requests), max_new_tokens=6, cache=SMALL)
    out, err = capsys.readouterr()
    assert "100%" not in err
    monkeypatch.setattr(progress, "is_enabled", lambda: True)
    generate(str(model), str(requests), max_new_tokens=6, cache=SMALL)
    shown = capsys.readouterr()
    assert shown.out == out and "answers" in shown.err and "100%" in shown.err


def test_requests_are_read_from_standard_input(
    model: Path, requests: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate_json(model, requests, capsys)
    monkeypatch.setattr(sys, "stdin", io.StringIO(requests.read_text()))
    lines = generate_json(model, Path("-"), capsys)
    assert [line["answer_ids"] for line in lines] == [line["answer_ids"] for line in expected]
    assert lines[1]["id"] == "-, line 3"


def test_a_model_without_a_recorded_wording_gets_the_default_wording(model: Path, tmp_path: Path) -> None:
    default = Engine.load(str(model), cache=SMALL.options()).prompt
    assert default is not None and default.instruction == PromptSettings().instruction
    export = Path(shutil.copytree(model, tmp_path / "export"))
    recorded = {"instruction": "Own.\n", "document": "{text}\n", "question": "{question}"}
    config = json.loads((export / "config.json").read_text())
    config["block_attention"] = {"prompt": recorded, "documents_in": "user", "order": "ascending"}
    (export / "config.json").write_text(json.dumps(config))
    trained = Engine.load(str(export), cache=SMALL.options()).prompt
    assert trained is not None and trained.instruction == "Own.\n"


def test_a_byte_order_mark_is_ignored(
    model: Path,
    requests: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = [line["answer_ids"] for line in generate_json(model, requests, capsys)]
    marked = tmp_path / "marked.jsonl"
    marked.write_text(requests.read_text(), encoding="utf-8-sig")
    assert [line["answer_ids"] for line in generate_json(model, marked, capsys)] == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(marked.read_text(encoding="utf-8")))
    assert [line["answer_ids"] for line in generate_json(model, Path("-"), capsys)] == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles")
def test_compile_is_refused_without_a_gpu(model: Path, requests: Path) -> None:
    with pytest.raises(UserError, match="compile is for rotated queries on a GPU"):
        generate(str(model), str(requests), compile=True, cache=SMALL)


def test_trim_drops_documents_of_a_long_prompt(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [{"text": str(i) * 1500, "score": i} for i in range(4)]
    source = write(tmp_path / "long.jsonl", [{"documents": documents, "question": "?"}])
    with pytest.raises(UserError, match="long.jsonl, line 1: .* the model has 4096 positions"):
        generate_json(model, source, capsys)
    (line,) = generate_json(model, source, capsys, trim=True)
    assert line["blocks"] == 5


@pytest.mark.parametrize("scores", [[None] * 12, [1] * 3 + [0] * 9, [1] * 12])
def test_trim_drops_the_last_documents_of_equal_score(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], scores: list[int | None]
) -> None:
    documents = [
        {"text": f"{i:04}" * 375} | ({} if score is None else {"score": score})
        for i, score in enumerate(scores)
    ]
    prompts = [documents, documents[:2]]
    source = write(tmp_path / "long.jsonl", [{"documents": prompt, "question": "?"} for prompt in prompts])
    trimmed, short = generate_json(model, source, capsys, trim=True)
    assert trimmed["answer_ids"] == short["answer_ids"] and trimmed["prompt_tokens"] == short["prompt_tokens"]
    assert trimmed["blocks_reused"] == 0 and short["blocks_reused"] == short["blocks"] - 1


# the cache's folder


def test_a_second_process_reuses_every_block(
    model: Path, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    first = generate_json(model, requests, capsys, cache=cached_in(folder))
    options = ["--json", "--max-new-tokens", "6", "--cache", folder, "--host-bytes", "1MB"]
    done = run_ranks("generate", model, "--input", requests, *options)
    assert done.returncode == 0, done.stderr
    second = [json.loads(line) for line in done.stdout.splitlines()]
    for a, b in zip(first, second, strict=True):
        assert b["answer_ids"] == a["answer_ids"] and b["answer"] == a["answer"]
        assert b["blocks_reused"] == b["blocks"] - 1 and "computed" not in b["sources"]
    assert second[0]["sources"] == {"disk": 5} and second[1]["sources"] == {"host": 4}
    host, disk = (sum(line["sources"].get(tier, 0) for line in second) for tier in ("host", "disk"))
    tiers = f"{host} from the host, {disk} from the disk"
    assert done.stderr.startswith(f"4 answers; 14 of 14 context blocks reused ({tiers}), ")


def test_a_damaged_entry_is_recomputed_and_changes_no_answer(
    model: Path, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    first = generate_json(model, requests, capsys, cache=cached_in(folder))
    damaged = next(CacheFolder(folder).entries()).path
    content = bytearray(damaged.read_bytes())
    content[-2] ^= 4
    damaged.write_bytes(content)
    second = generate_json(model, requests, capsys, cache=cached_in(folder))
    assert [line["answer_ids"] for line in first] == [line["answer_ids"] for line in second]
    assert sum(line["sources"].get("computed", 0) for line in second) == 1
    third = generate_json(model, requests, capsys, cache=cached_in(folder))
    assert not any("computed" in line["sources"] for line in third)


def test_the_folder_stays_within_its_budget(
    model: Path, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = cached_in(tmp_path / "cache", disk="40kB")
    expected = generate_json(model, requests, capsys)
    lines = generate_json(model, requests, capsys, cache=cache)
    assert [line["answer_ids"] for line in lines] == [line["answer_ids"] for line in expected]
    assert 0 < sum(entry.num_bytes for entry in CacheFolder(tmp_path / "cache").entries()) <= 40_000


# errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "half"}, "--mode is 'half' (allowed: block, full)"),
        ({"stream": True}, "leave out --json"),
        ({"as_json": False, "stream": True, "batch_size": 2}, "leave out --json and --batch-size"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 0.9}, "top_p is 0.9 at temperature 0"),
        (
            {"mode": "full", "cache": CacheArguments(folder=Path("no/such"))},
            "--mode full has no blocks to store",
        ),
        ({"stop": [""]}, "non-empty texts"),
        ({"cache": CacheArguments(disk="1GB")}, "--cache-bytes needs --cache FOLDER"),
        ({"cache": CacheArguments(host="much")}, "'much' is not a size"),
        ({"cache": CacheArguments(device="")}, "'' is not a size"),
        ({"cache": CacheArguments(folder=Path("no/such"), disk="0")}, "cannot hold a block"),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_answer(
    model: Path, requests: Path, arguments: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as raised:
        generate(str(model), str(requests), **{"as_json": True, "max_new_tokens": 2} | arguments)
    assert message in str(raised.value) and not capsys.readouterr().out
    assert not Path("no/such").exists()


def test_unknown_fields_of_documents_are_a_warning(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [{"text": "a", "id": 1, "color": 2}, {"text": "b", "color": 3}]
    source = write(tmp_path / "fields.jsonl", [{"documents": documents, "question": "c"}] * 2)
    generate(str(model), str(source), max_new_tokens=1, cache=SMALL)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and warnings[0].endswith("documents[].color (2)")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not JSON"),
        ('{"question": "b", "n": ' + "1" * 5000 + "}", "line 3 is not JSON"),
        ('{"blocks": ["a"], "id": 1, "id": 2}', "line 3 is not JSON: the key 'id' occurs twice"),
        ('{"blocks": ["a"], "tools": [1]}', "line 3: unknown field 'tools'"),
        ("[1]", "line 3: the request"),
        ('{"documents": ["a"]}', "line 3: "),
        ('{"documents": ["a", ""], "question": "b"}', "line 3: "),
        ('{"blocks": ["a", ""]}', "line 3: "),
        ('{"blocks": ["a"], "colour": 1}', "line 3: unknown field 'colour'"),
        ('{"id": "long", "blocks": ["' + "a" * 5000 + '"]}', "prompt long: "),
    ],
)
def test_an_error_names_the_line_before_the_first_answer(
    model: Path, tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_text(f"{json.dumps(REQUESTS[0])}\n\n{line}\n")
    with pytest.raises(UserError) as raised:
        generate(str(model), str(source), max_new_tokens=2, cache=SMALL)
    assert message in str(raised.value) and not capsys.readouterr().out


def test_input_without_a_request_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    for name, message in [
        ("empty", "holds no request"),
        ("latin", "cannot be read"),
        ("none", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            generate(str(model), str(tmp_path / f"{name}.jsonl"))


def test_an_error_exits_with_2_and_prints_no_answer(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_text(json.dumps(REQUESTS[0]) + '\n{"question": "Who?"}\n')
    done = blockft("generate", model, "--input", source)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and f"{source}, line 2" in done.stderr
