"""Encode evaluation questions, answer them in batches, and store the answers.

An interrupted evaluation resumes after its last complete batch.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, takewhile, zip_longest
from pathlib import Path

from blockft.data.chat_template import TemplateMismatch
from blockft.data.fit import PromptTooLong
from blockft.data.sample import SKIP_REMEDY, Sample
from blockft.digest import DIGEST, digest_json
from blockft.evaluation.methods import Method, MethodBatch
from blockft.evaluation.metrics import is_yes_no
from blockft.evaluation.report import ALL, Prediction
from blockft.inference.answer import PartialAnswer
from blockft.inference.engine import AttentionMode, Engine
from blockft.inference.text_stream import TextStream

GROUP_FIELDS = ("type", "level")
"""Fields of a sample's metadata whose values form groups of the report."""

YES_NO = "yes/no"
"""The group of a source's questions whose gold answers are all yes or no."""

TOO_LONG = "too long"
"""The reason under which questions that do not fit into the model are counted."""

WINDOW_BATCHES = 16
"""Questions are sorted by length within windows of this many batches."""

Batch = tuple[int, ...]
"""The indices of a batch's samples."""

Blocks = Sequence[Sequence[int]]
"""The token ids of each block of a prompt."""


@dataclass(frozen=True)
class AnswerRecord:
    """One line of an answer file: the answer to the sample at `index`."""

    index: int
    answer: str
    num_blocks: int
    prompt_tokens: int
    num_tokens: int


@dataclass(frozen=True)
class EncodedQuestions:
    """The questions that fit into the model, with their prompts, and counts of the others.

    samples: the questions, trimmed where necessary.
    prompts: the prompt of each sample.
    dropped: the number of questions left out, by reason.
    num_trimmed: the number of questions that lost documents.
    first_too_long: the message about the first question that is too long; empty if there is none.
    """

    samples: list[Sample]
    prompts: list[Blocks]
    dropped: Counter[str]
    num_trimmed: int
    first_too_long: str = ""


def encode_questions(
    engine: Engine, samples: Iterable[Sample], max_new_tokens: int, *, trim: bool, skip_bad: bool
) -> EncodedQuestions:
    """Encode all questions; those that are too long for the model are left out and counted.

    trim: drop the least relevant documents of a question that is too long.
    skip_bad: leave out and count questions that the chat template or the tokenizer changes.

    Raises:
        TemplateMismatch: the template or the tokenizer changes a question, which the message names.
    """
    fitting: list[Sample] = []
    prompts: list[Blocks] = []
    dropped, num_trimmed, first_too_long = Counter[str](), 0, ""
    for sample in samples:
        try:
            fitted, blocks = engine.fit(sample, max_new_tokens, trim=trim)
        except PromptTooLong as error:
            dropped[TOO_LONG] += 1
            first_too_long = first_too_long or str(error)
        except TemplateMismatch as error:
            if not skip_bad:
                raise TemplateMismatch(f"{error} {SKIP_REMEDY}", error.reason) from error
            dropped[error.reason] += 1
        else:
            fitting.append(fitted)
            # all prompts wait in memory: an array takes 4 bytes per token, a list 36
            prompts.append([array("i", block) for block in blocks])
            num_trimmed += fitted is not sample
    return EncodedQuestions(fitting, prompts, dropped, num_trimmed, first_too_long)


def plan_batches(samples: Sequence[Sample], batch_size: int) -> list[Batch]:
    """Group samples of similar length into batches.

    Samples are sorted by length within windows of `WINDOW_BATCHES` batches. The same samples always give the
    same batches.
    """
    lengths = [sum(map(len, sample.blocks)) for sample in samples]
    window, batches = WINDOW_BATCHES * batch_size, []
    for start in range(0, len(samples), window):
        indices = sorted(range(start, min(start + window, len(samples))), key=lengths.__getitem__)
        batches += [tuple(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
    return batches


def answer_batch(
    engine: Engine, prompts: Sequence[Blocks], batch: Batch, *, mode: AttentionMode, max_new_tokens: int
) -> list[AnswerRecord]:
    """Answer the prompts of a batch greedily in block or full mode."""
    # the last bits of a block's keys and values depend on the blocks computed with it: start each batch with
    # an empty cache, so that a resumed evaluation computes the same groups of blocks
    engine.clear_cache()
    answers = engine.generate_ids([prompts[i] for i in batch], mode=mode, max_new_tokens=max_new_tokens)
    return [
        AnswerRecord(index, answer.text, answer.num_blocks, answer.prompt_tokens, len(answer.ids))
        for index, answer in zip(batch, answers, strict=True)
    ]


def answer_batch_by_method(
    engine: Engine,
    prompts: Sequence[Blocks],
    batch: Batch,
    *,
    mode: AttentionMode,
    max_new_tokens: int,
    method: Method,
) -> list[AnswerRecord]:
    """Answer the prompts of a batch greedily by masked forward passes, without the block cache.

    Block mode is computed as the method says; full mode does not depend on it.
    """
    blocks = [prompts[i] if mode == "block" else [[*chain.from_iterable(prompts[i])]] for i in batch]
    forward = MethodBatch(engine.model, blocks, method if mode == "block" else Method())
    partial_answers = [PartialAnswer(TextStream(engine.tokenizer), engine.eos_token_ids) for _ in blocks]
    next_ids = forward.prefill().argmax(dim=-1).tolist()
    for step in range(1, max_new_tokens + 1):
        for partial, token in zip(partial_answers, next_ids, strict=True):
            partial.append(token, 0)
        if all(partial.finished for partial in partial_answers) or step == max_new_tokens:
            break
        next_ids = forward.decode_step(next_ids).argmax(dim=-1).tolist()
    for partial in partial_answers:
        partial.stream.close()
    return [
        AnswerRecord(index, partial.stream.text.strip(), len(prompt), sum(map(len, prompt)), len(partial.ids))
        for index, partial, prompt in zip(batch, partial_answers, blocks, strict=True)
    ]


class AnswerFile:
    """The answers in one mode, in the order of the batches. Each line has a digest.

    An existing file is read up to the first incomplete batch or damaged line, and truncated there.
    `evaluation` identifies the evaluation and the mode: lines of another one count as damaged.
    `damaged_line` is the number of the damaged line, or None. An interruption damages no complete line.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, batches: Sequence[Batch], evaluation: str) -> None:
        self._path, self._batches, self._evaluation = path, batches, evaluation
        self.records: list[AnswerRecord] = []
        self.damaged_line: int | None = None
        if path.is_file():
            lines = path.read_bytes().split(b"\n")[:-1]
            order = chain.from_iterable(batches)
            found = [
                self._parse(line, index) for line, index in zip_longest(lines, order) if line is not None
            ]
            valid = list(takewhile(lambda record: record is not None, found))
            if len(valid) < len(lines):
                self.damaged_line = len(valid) + 1
            num_bytes = 0
            for batch in batches:
                if len(self.records) + len(batch) > len(valid):
                    break
                start, end = len(self.records), len(self.records) + len(batch)
                self.records += [record for record in valid[start:end] if record]
                num_bytes += sum(len(line) + 1 for line in lines[start:end])
            os.truncate(path, num_bytes)
        self._file = _identify(path)

    def _parse(self, line: bytes, index: int | None) -> AnswerRecord | None:
        """Return the answer of a line to the sample at `index`, or None if the line is another one."""
        try:
            fields = json.loads(line)
            del fields[DIGEST]
            record = AnswerRecord(**fields)
            is_valid = record.index == index and self._to_line(record) == line + b"\n"
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return record if is_valid else None

    def _to_line(self, record: AnswerRecord) -> bytes:
        fields = asdict(record)
        return json.dumps(fields | {DIGEST: digest_json([self._evaluation, fields])}).encode() + b"\n"

    @property
    def remaining_batches(self) -> Sequence[Batch]:
        """The batches without answers."""
        answered = {record.index for record in self.records}
        return [batch for batch in self._batches if batch[0] not in answered]

    def add(self, records: Sequence[AnswerRecord]) -> None:
        """Append the answers of a batch and wait until they are on the disk.

        If another process has removed or changed the file meanwhile, all answers are written again.
        """
        is_own = _identify(self._path) == self._file
        with self._path.open("ab" if is_own else "wb") as file:
            file.write(b"".join(map(self._to_line, records if is_own else [*self.records, *records])))
            file.flush()
            os.fsync(file.fileno())
        self._file = _identify(self._path)
        self.records += records


def _identify(path: Path) -> tuple[int, int, int] | None:
    """Return what tells whether a file is still as it was written, or None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size


def build_predictions(
    samples: Sequence[Sample], records: Iterable[AnswerRecord], max_new_tokens: int
) -> list[Prediction]:
    """Build the predictions from the answers, in the order of the samples."""
    return [
        Prediction(
            id=samples[record.index].id,
            answer=record.answer,
            golds=samples[record.index].answers,
            groups=question_groups(samples[record.index]),
            num_blocks=record.num_blocks,
            prompt_tokens=record.prompt_tokens,
            num_tokens=record.num_tokens,
            hit_token_limit=record.num_tokens == max_new_tokens,
        )
        for record in sorted(records, key=lambda record: record.index)
    ]


def question_groups(sample: Sample) -> tuple[str, ...]:
    """Return the report's groups of a question: its source, and its kinds within the source.

    The kinds are the values of `GROUP_FIELDS` in its metadata, and `YES_NO`. A source that is named like the
    group of all questions is renamed.
    """
    source = sample.source if sample.source != ALL else f"source {ALL}"
    kinds = [sample.meta[name] for name in GROUP_FIELDS if name in sample.meta]
    kinds += [YES_NO] * is_yes_no(sample.answers)
    return tuple(dict.fromkeys([source, *(f"{source}: {kind}" for kind in kinds)]))
