"""The part cache of `prepare`: what is read and encoded again, and what is not."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from blockft.config.choices import BadRecordPolicy, Format, Retriever
from blockft.config.settings import (
    ColumnSettings,
    ModelSettings,
    PromptSettings,
    Recipe,
    Source,
    SplittingSettings,
)
from blockft.data import sample_frames
from blockft.data.encoder import Encoder
from blockft.data.prepared import load_prepared
from blockft.data.sample import Sample
from blockft.errors import UserError
from blockft.folder_lock import lock_folder
from blockft.stages import source_parts
from blockft.stages.prepare import prepare
from tests.stages.test_prepare import files, squad_source

Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_frames, "FRAME_SAMPLES", 8)
    monkeypatch.setattr(sample_frames, "SHARD_SAMPLES", 32)


def last_log(recipe: Recipe) -> tuple[int, int]:
    """Return the number of shards that the last run has read and encoded."""
    out = Path(recipe.data.output_dir)
    entry = json.loads(out.with_name(f"{out.name}.log").read_text().splitlines()[-1])
    return entry["shards_read"], entry["shards_encoded"]


def cache_of(recipe: Recipe) -> Path:
    return Path(f"{recipe.data.output_dir}.cache")


def part_names(recipe: Recipe) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in cache_of(recipe).iterdir())


def fresh(recipe: Recipe, tmp_path: Path, name: str) -> dict[str, bytes]:
    """Prepare a recipe without a cache, and return the files."""
    data = recipe.data.model_copy(update={"output_dir": str(tmp_path / "fresh" / name)})
    return files(prepare(recipe.model_copy(update={"data": data})))


def refuse_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> Iterator[Sample]:
        raise AssertionError("a source was read")
        yield

    monkeypatch.setattr(source_parts, "read_source", read)


def test_an_added_source_is_encoded_alone(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe()
    prepare(recipe)
    assert last_log(recipe) == (7, 7)
    recipe = make_recipe(sources=[squad_source(tmp_path), *recipe.data.sources])
    out = prepare(recipe, overwrite=True)
    assert last_log(recipe) == (1, 1) and load_prepared(out).manifest["sources"][1]["shards"] == 7
    assert files(out) == fresh(recipe, tmp_path, "both")
    # a removed source costs nothing, and what it contributed is removed
    recipe = make_recipe()
    out = prepare(recipe, overwrite=True)
    assert last_log(recipe) == (0, 0) and files(out) == fresh(recipe, tmp_path, "one")
    assert part_names(recipe) == ["encode", "read"]


def test_another_tokenizer_reads_nothing_again(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    prepare(recipe)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    tokenizer.chat_template = tokenizer.chat_template.replace("'\n'", "'\n\n'")
    tokenizer.save_pretrained(tmp_path / "other")
    recipe.model = ModelSettings(path=str(tmp_path / "other"))
    expected = fresh(recipe, tmp_path, "other")
    refuse_reading(monkeypatch)
    assert files(prepare(recipe, overwrite=True)) == expected
    assert last_log(recipe) == (0, 7) and part_names(recipe) == ["encode", "read"]


CHANGES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "row_len": ({"row_len": 512}, (0, 7)),
    "too_long": ({"too_long": "trim"}, (0, 7)),
    "workers": ({"num_workers": 2}, (0, 0)),
    "modes": ({"modes": ["block"]}, (0, 0)),
    "positions": ({"positions": "local"}, (0, 0)),
    # samples have their wording, and are not split
    "splitting": ({"splitting": SplittingSettings(max_blocks=3)}, (0, 0)),
    "bad records": ({"on_bad_record": BadRecordPolicy.skip}, (7, 7)),
    "seed": ({"seed": 5}, (7, 7)),
    "one copy more": ({"num_copies": 2, "order": "shuffled"}, (7, 7)),
    "shared": ({"shared_context": True}, (7, 7)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_repeats_what_depends_on_it(
    make_recipe: Make, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockft.stages.prepare.check_copies", lambda data: None)
    settings, expected = CHANGES[change]
    prepare(make_recipe())
    recipe = make_recipe(**settings)
    out = prepare(recipe, overwrite=True)
    assert last_log(recipe) == expected
    assert files(out) == fresh(recipe, tmp_path, "changed")


def test_a_wording_changes_questions_and_no_chats(make_recipe: Make, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"instruction": "Say a.", "output": "a"}\n')
    sources = [squad_source(tmp_path), Source(format=Format.alpaca, path=str(chats))]
    prepare(make_recipe(sources=sources))
    recipe = make_recipe(sources=sources, prompt=PromptSettings(instruction="Read."))
    out = prepare(recipe, overwrite=True)
    assert files(out) == fresh(recipe, tmp_path, "changed")
    # the wording of questions decides the hashes for the check of leaks, but nothing here changes it
    assert last_log(recipe) == (1, 1)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_source_that_is_named_twice_is_encoded_once(
    make_recipe: Make, tmp_path: Path, num_workers: int
) -> None:
    sources = make_recipe().data.sources
    recipe = make_recipe(sources=[*sources, squad_source(tmp_path), *sources], num_workers=num_workers)
    manifest = load_prepared(prepare(recipe)).manifest
    assert last_log(recipe) == (8, 8)
    first, squad, second = manifest["sources"]
    assert second == first != squad and manifest["num_samples"] == 2 * first["kept"] + squad["kept"]


def test_a_changed_file_is_read_again(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe()
    prepare(recipe)
    path = Path(recipe.data.sources[0].path)
    path.write_text(path.read_text().replace("Fox 3.", "Cat 3."))
    out = prepare(recipe, overwrite=True)
    assert last_log(recipe) == (7, 7) and files(out) == fresh(recipe, tmp_path, "changed")


def test_a_source_is_read_again_if_its_corpus_gets_another_file(make_recipe: Make, tmp_path: Path) -> None:
    corpus, questions = tmp_path / "corpus", tmp_path / "questions.jsonl"
    corpus.mkdir()
    questions.write_text('{"question": "Who is the fox?", "answers": "Fox 1"}\n')
    (corpus / "a.jsonl").write_text('{"text": "Fox 1 is a fox."}\n{"text": "A dog."}\n')
    source = Source(
        format=Format.columns,
        path=str(questions),
        columns=ColumnSettings(question="question", answers=["answers"]),
        corpus=str(corpus),
        retriever=Retriever.bm25,
    )
    recipe = make_recipe(sources=[source], num_documents=2)
    before = files(prepare(recipe))
    (corpus / "b.jsonl").write_text('{"text": "Who is the fox? Fox 1."}\n')
    out = prepare(recipe, overwrite=True)
    assert last_log(recipe) == (1, 1) and before != files(out) == fresh(recipe, tmp_path, "changed")


def test_a_file_that_changes_while_it_is_read_is_refused(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    path, read_source = Path(recipe.data.sources[0].path), source_parts.read_source

    def read(*given: Any, **options: Any) -> Iterator[Sample]:
        yield from read_source(*given, **options)
        path.write_text(path.read_text() + "\n")

    monkeypatch.setattr(source_parts, "read_source", read)
    with pytest.raises(UserError, match="changed while it was read: run the command again"):
        prepare(recipe)
    assert not Path(recipe.data.output_dir).exists()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("num_frames", [1, 3, 4, 9, 24])
def test_an_interrupted_run_repeats_no_finished_shard(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_frames: int
) -> None:
    recipe = make_recipe()
    expected = fresh(recipe, tmp_path, "undisturbed")
    encoded: list[str] = []
    encode = Encoder.encode

    def count(self: Encoder, samples: list[Sample]) -> Any:
        if len(encoded) >= 8 * num_frames and not resumed:
            raise Interrupted
        encoded.extend(sample.id for sample in samples)
        return encode(self, samples)

    monkeypatch.setattr(Encoder, "encode", count)
    resumed = False
    with pytest.raises(Interrupted):
        prepare(recipe)
    assert not Path(recipe.data.output_dir).exists()
    # a shard is finished when the first frame of the next one arrives
    num_finished = 8 * (num_frames - 1) // 32 * 32
    resumed, encoded = True, []
    assert files(prepare(recipe)) == expected
    assert encoded == [str(i) for i in range(num_finished, 200)]
    assert part_names(recipe) == ["encode", "read"]


def test_a_damaged_part_is_written_again_with_a_message(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe()
    expected = files(prepare(recipe))
    capsys.readouterr()
    for pattern in ("encode-*/samples-00003.jsonl", "encode-*/examples/00000.arrow", "encode-*/00001.hashes"):
        (path,) = cache_of(recipe).glob(pattern)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.unlink()  # otherwise the prepared folder would be damaged with it
        path.write_bytes(content)
        assert files(prepare(recipe, overwrite=True)) == expected
        (line,) = capsys.readouterr().err.splitlines()
        assert path.name in line and "is written again" in line


def test_damage_of_what_was_read_is_found_before_another_tokenizer_uses_it(
    make_recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(make_recipe())
    (path,) = cache_of(make_recipe()).glob("read-*/00002.frames")
    path.write_bytes(path.read_bytes()[:-1])
    recipe = make_recipe(row_len=512)
    prepare(recipe, overwrite=True)
    assert last_log(recipe) == (5, 7) and "is damaged (00002.frames has" in capsys.readouterr().err


def test_a_lost_cache_costs_time_only(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe()
    expected = files(prepare(recipe))
    for path in sorted(cache_of(recipe).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert load_prepared(Path(recipe.data.output_dir)).manifest
    assert files(prepare(recipe, overwrite=True)) == expected


def test_a_cache_that_is_named_is_shared_and_not_cleaned(make_recipe: Make, tmp_path: Path) -> None:
    cache = tmp_path / "my cache"
    cache.mkdir()
    (cache / "notes.txt").write_text("precious")
    one = make_recipe(cache_dir=str(cache), output_dir=str(tmp_path / "one"))
    other = make_recipe(cache_dir=str(cache), output_dir=str(tmp_path / "other"), row_len=512)
    prepare(one)
    prepare(other)
    assert last_log(other) == (0, 7)
    prepare(one, overwrite=True)
    assert last_log(one) == (0, 0) and (cache / "notes.txt").read_text() == "precious"
    assert not cache_of(one).exists()
    assert b"my cache" not in (tmp_path / "one" / "manifest.json").read_bytes()


def test_one_process_uses_a_cache(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(cache_dir=str(tmp_path / "cache"))
    with (
        lock_folder(tmp_path / "cache", "blockft prepare"),
        pytest.raises(UserError, match="is being written by process"),
    ):
        prepare(recipe)
    assert not Path(recipe.data.output_dir).exists()


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("out/set", "is data.output_dir"),
        ("out", "contains data.output_dir"),
        ("out/set/cache", "lies inside data.output_dir"),
        ("run/cache", "lies inside train.output_dir"),
        (".", "contains data.sources.0.path"),
        ("source.jsonl", "is not a folder"),
    ],
)
def test_a_cache_that_would_harm_another_folder_is_refused(
    make_recipe: Make, tmp_path: Path, cache: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(make_recipe(cache_dir=str(tmp_path / cache)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.jsonl"]


def test_a_hub_dataset_of_unknown_revision_is_read_every_time(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    revisions: list[Any] = []

    def load(*_: Any, revision: str | None = None, **__: Any) -> Iterator[Any]:
        revisions.append(revision)
        return iter([{"id": "a", "instruction": "Say a.", "output": "a"}])

    monkeypatch.setattr("datasets.load_dataset", load)
    recipe = make_recipe(sources=[Source(format=Format.alpaca, path="owner/name", split="train")])
    for known, num_read in (([None, None], 1), (["abc", "abc"], 0), (["def"], 1)):
        for revision in known:
            monkeypatch.setattr("blockft.stages.part_options._find_revision", lambda *_, r=revision: r)
            prepare(recipe, overwrite=True)
        assert last_log(recipe) == (num_read, num_read)
    assert revisions == [None, None, "abc", "def"]
    assert part_names(recipe) == ["encode", "read"]


def test_parts_that_nobody_can_find_again_are_removed_from_every_cache(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"id": "a", "instruction": "Say a.", "output": "a"}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter([record]))
    cache = tmp_path / "cache"
    sources = [Source(format=Format.alpaca, path="owner/name", split="train"), squad_source(tmp_path)]
    prepare(make_recipe(sources=sources, cache_dir=str(cache)))
    # the revision of the dataset is unknown; the parts of the file stay
    assert len(list(cache.iterdir())) == 2


def test_workers_that_merge_questions_give_the_bytes_of_one_process(
    make_recipe: Make, tmp_path: Path
) -> None:
    recipe = make_recipe(num_workers=3, shared_context=True)
    assert files(prepare(recipe)) == fresh(make_recipe(shared_context=True), tmp_path, "one")
