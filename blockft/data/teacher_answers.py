"""Answers of a teacher: what identifies a question, and the file that keeps the answers.

A question is the messages that the teacher reads, with the options that decide its answer. Equal questions
have equal keys, so that each is asked once, in whatever sources, copies and recipes it occurs.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from blockft.data.sample import Message
from blockft.digest import DIGEST, digest_json
from blockft.errors import UserError
from blockft.outputs import is_disk_full, write_atomic

FORMAT = "blockft teacher answer 1"
"""Part of every key and digest: another layout of the lines needs another text."""

FOLLOWING = "following"
"""Field of a line: the number of lines of its batch that follow. The last line of a batch has none."""

_START = b'{"key": "'
"""The first bytes of every line."""


class Finish(StrEnum):
    """How a teacher finished with a question; only `stop` gives a response to learn."""

    stop = "stop"
    length = "length"
    refused = "refused"
    too_long = "too long"
    other = "other"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a teacher is asked.

    key: see `question_key`.
    messages: the prompt with its blocks.
    documents: the indices of the blocks that are documents.
    sample: names the first sample with this question, for messages to the user.
    """

    key: str
    messages: tuple[Message, ...]
    documents: tuple[int, ...] = ()
    sample: str = ""


@dataclass(frozen=True, kw_only=True)
class TeacherAnswer:
    """The answer to the question `key`, and the number of tokens that the teacher counted."""

    key: str
    answer: str
    finish: Finish
    prompt_tokens: int
    answer_tokens: int


def question_key(messages: Sequence[Message], identity: Mapping[str, Any]) -> str:
    """Return the key of the question that these messages put to a teacher: 64 hexadecimal digits.

    identity: the teacher, and the options that decide its answers, as JSON.
    """
    return digest_json([FORMAT, identity, [[message.role, *message.content] for message in messages]])


class AnswersFile:
    """A file of answers: JSON lines, each with a digest. Its caller holds its lock.

    `answers` maps keys to answers. A batch of answers is on the disk before `add` returns. When the file is
    opened, an incomplete last line is removed, and so are the other lines of its batch. `sort` orders the
    lines by key, so that the content of the file does not depend on the order in which the answers came.

    Raises:
        UserError: a line is damaged or is no answer, or the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, TeacherAnswer] = {}
        self._is_sorted = True
        try:
            if os.path.lexists(path):
                if not path.is_file():
                    raise UserError(f"the answers file {path} is not a file: set data.teacher.answers_file")
                with path.open("rb") as file:
                    num_bytes = self._read(file)
                if num_bytes < path.stat().st_size:
                    os.truncate(path, num_bytes)
        except OSError as error:
            raise UserError(f"the answers file {path} cannot be used: {error.strerror}") from error

    def _read(self, file: BinaryIO) -> int:
        """Read all complete batches, and return their number of bytes."""
        num_bytes, batch = 0, list[TeacherAnswer]()
        size, expected = 0, 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and (_START.startswith(line) or line.startswith(_START)):
                break  # the process was killed, or the disk was full
            answer, following = _parse_line(line) or (None, 0)
            if answer is None or batch and following != expected:
                raise UserError(
                    f"line {number} of the answers file {self.path} is damaged, or is no answer of a "
                    "teacher: remove the line, and its question is asked again, or restore the file"
                )
            batch.append(answer)
            size += len(line)
            self._is_sorted &= not following
            expected = following - 1
            if not following:
                for complete in batch:
                    self._take(complete)
                num_bytes, size, batch = num_bytes + size, 0, []
        return num_bytes

    def _take(self, answer: TeacherAnswer) -> None:
        """Keep an answer; of several answers to one question the first one is kept."""
        last = next(reversed(self.answers), "")
        self._is_sorted &= answer.key > last
        self.answers.setdefault(answer.key, answer)

    def add(self, batch: Sequence[TeacherAnswer]) -> None:
        """Append the answers of a batch and wait until they are on the disk.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        lines = (
            _format_line(answer, following)
            for following, answer in zip(range(len(batch))[::-1], batch, strict=True)
        )
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            with self.path.open("ab") as file:
                try:
                    file.write("".join(lines).encode())
                    file.flush()
                    os.fsync(file.fileno())
                except BaseException:
                    os.truncate(file.fileno(), size)
                    raise
        except OSError as error:
            reason = "the disk is full" if is_disk_full(error) else error.strerror
            raise UserError(f"the answers file {self.path} cannot be written: {reason}") from error
        self._is_sorted &= len(batch) == 1
        for answer in batch:
            self._take(answer)

    def sort(self) -> None:
        """Write the lines anew, sorted by key, unless they are sorted. The file is replaced atomically.

        Raises:
            UserError: the file cannot be written.
        """
        if not self._is_sorted:
            lines = (_format_line(self.answers[key]) for key in sorted(self.answers))
            # the file behind a symbolic link is replaced, not the link
            write_atomic(Path(os.path.realpath(self.path)), "".join(lines))
            self._is_sorted = True


def _format_line(answer: TeacherAnswer, following: int = 0) -> str:
    fields = asdict(answer) | ({FOLLOWING: following} if following else {})
    return json.dumps(fields | {DIGEST: digest_json([FORMAT, fields])}, ensure_ascii=False) + "\n"


def _parse_line(line: bytes) -> tuple[TeacherAnswer, int] | None:
    """Return the answer of a line, and how many lines of its batch follow; None if the line is damaged."""
    try:
        fields = json.loads(line)
        del fields[DIGEST]
        following = fields.pop(FOLLOWING, 0)
        answer = TeacherAnswer(**fields | {"finish": Finish(fields["finish"])})
        is_valid = type(following) is int and _format_line(answer, following).encode() == line
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return (answer, following) if is_valid else None
