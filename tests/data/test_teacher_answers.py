"""The file of a teacher's answers: equal bytes in any order, interruptions, damage, and keys of questions."""

import json
import os
import random
from itertools import permutations
from pathlib import Path

import pytest

from blockft.data.sample import Message
from blockft.data.teacher_answers import AnswersFile, Finish, TeacherAnswer, question_key
from blockft.errors import UserError


def answer(key: str, text: str = "yes", finish: Finish = Finish.stop) -> TeacherAnswer:
    return TeacherAnswer(key=key, answer=text, finish=finish, prompt_tokens=5, answer_tokens=2)


ANSWERS = [
    answer("c"),
    answer("a", "“été”\n\u2028\x00😀", Finish.length),
    answer("d", ""),
    answer("b", "x" * 999),
]


def write(path: Path, *batches: list[TeacherAnswer]) -> bytes:
    file = AnswersFile(path)
    for batch in batches:
        file.add(batch)
    return path.read_bytes()


def test_what_is_added_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    assert AnswersFile(path).answers == {} and not path.exists()
    write(path, ANSWERS[:1], ANSWERS[1:])
    assert AnswersFile(path).answers == {a.key: a for a in ANSWERS}
    assert [json.loads(line)["key"] for line in path.open()] == ["c", "a", "d", "b"]


def test_sorted_content_does_not_depend_on_order_batches_and_restarts(tmp_path: Path) -> None:
    contents = set()
    for number, order in enumerate(permutations(ANSWERS)):
        path = tmp_path / f"{number}.jsonl"
        split = number % 4
        write(path, *([order[:split]] if split else []), [*order[split:3]] or [order[0]])
        file = AnswersFile(path)
        file.add([a for a in order if a.key not in file.answers])
        file.sort()
        contents.add(path.read_bytes())
        assert AnswersFile(path).answers == {a.key: a for a in ANSWERS}
    (content,) = contents
    assert [json.loads(line)["key"] for line in content.splitlines()] == ["a", "b", "c", "d"]


def test_a_sorted_file_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, ANSWERS)
    AnswersFile(path).sort()
    before = path.stat()
    AnswersFile(path).sort()
    assert path.stat().st_ino == before.st_ino and path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_file_that_ends_anywhere_loses_its_last_batch_only(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    whole = write(path, ANSWERS[:1], ANSWERS[1:3], ANSWERS[3:])
    ends = [
        0,
        *(
            len(write(tmp_path / f"{n}", *batches))
            for n, batches in enumerate(
                ([ANSWERS[:1]], [ANSWERS[:1], ANSWERS[1:3]], [ANSWERS[:1], ANSWERS[1:3], ANSWERS[3:]])
            )
        ),
    ]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        file = AnswersFile(path)
        end = max(e for e in ends if e <= size)
        assert path.stat().st_size == end
        assert len(file.answers) == [0, 1, 3, 4][ends.index(end)]
        file.add([a for a in ANSWERS if a.key not in file.answers] or [answer("e")])
        assert {a.key for a in ANSWERS} <= AnswersFile(path).answers.keys()


def test_every_flipped_byte_is_found_and_its_line_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    whole = write(path, ANSWERS[:1], ANSWERS[1:3], ANSWERS[2:3])
    rng = random.Random(0)
    for position in range(len(whole) - 1):  # without its last byte a line is incomplete
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"line [1-4] of the answers file .* is damaged") as caught:
            AnswersFile(path)
        assert "\n" not in str(caught.value) and path.read_bytes() == damaged


def test_a_line_may_be_removed_and_files_may_be_joined(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, *([a] for a in ANSWERS))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1:] + lines[1:] + lines[2:]))
    file = AnswersFile(path)
    assert file.answers == {a.key: a for a in ANSWERS[1:]}
    file.sort()
    assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("content", [b"notes", b'{"id": 1}', b'{"key": 1}\n', b"\n", b"\xff\xfe", b"[]\n[]"])
def test_a_file_of_another_kind_is_refused_and_stays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="line 1 of the answers file .*notes.txt is damaged, or is no answer"):
        AnswersFile(path)
    assert path.read_bytes() == content


def test_a_folder_or_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="is not a file"):
            AnswersFile(path)


def test_a_batch_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "answers.jsonl"
    before = write(path, ANSWERS[:1])
    file = AnswersFile(path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="cannot be written: the disk is full"):
            file.add(ANSWERS[1:])
    assert path.read_bytes() == before
    file.add(ANSWERS[1:])
    assert AnswersFile(path).answers.keys() == {a.key for a in ANSWERS}


def test_a_key_depends_on_messages_blocks_and_identity() -> None:
    def key(*content: str, role: str = "user", **identity: object) -> str:
        return question_key([Message(role=role, content=content)], identity)

    different = [
        key("a", "b"),
        key("b", "a"),
        key("ab"),
        key("a", "b", role="system"),
        key("a", "b", model="m"),
    ]
    assert len({*different}) == len(different) and key("a", "b") == different[0]
    assert key("a", x=1, y=2) == key("a", y=2, x=1)


def test_a_file_behind_a_symbolic_link_is_sorted_and_stays_shared(tmp_path: Path) -> None:
    (tmp_path / "shared.jsonl").touch()
    (tmp_path / "link").symlink_to("shared.jsonl")
    file = AnswersFile(tmp_path / "link")
    file.add(ANSWERS)
    file.sort()
    assert (tmp_path / "link").is_symlink()
    lines = (tmp_path / "shared.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["key"] for line in lines] == ["a", "b", "c", "d"]
