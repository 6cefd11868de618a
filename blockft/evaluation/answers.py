"""The answers of an evaluation, batch by batch, kept on disk so that one that was killed goes on."""

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from blockft.data.chat_template import TemplateMismatch
from blockft.data.fit import PromptTooLong
from blockft.data.sample import Sample
from blockft.evaluation.report import ALL, Prediction
from blockft.inference.engine import Engine

GROUPS = ("type", "level")
"""Entries of a sample's meta data by which the questions of a source are also counted apart."""

TOO_LONG = "too long"
"""Why a question is left out that does not fit into the model."""

WINDOW_BATCHES = 16
"""Batches whose questions are sorted by length together."""

Batch = tuple[int, ...]
"""The places of a batch's samples in the data."""

Blocks = Sequence[Sequence[int]]
"""The token ids of each block of a prompt."""


@dataclass(frozen=True)
class AnswerRecord:
    """One line of the file: the answer to the sample at `index`."""

    index: int
    answer: str
    num_blocks: int
    prompt_tokens: int
    num_tokens: int


def plan_batches(samples: Sequence[Sample], batch_size: int) -> list[Batch]:
    """Batches of prompts of like length: sorted inside windows of the data, always in the same way."""
    lengths = [sum(map(len, sample.blocks)) for sample in samples]
    window, batches = WINDOW_BATCHES * batch_size, []
    for start in range(0, len(samples), window):
        places = sorted(range(start, min(start + window, len(samples))), key=lengths.__getitem__)
        batches += [tuple(places[i : i + batch_size]) for i in range(0, len(places), batch_size)]
    return batches


@dataclass(frozen=True)
class EncodedQuestions:
    """The questions of an evaluation that fit, as asked, each with its prompt; what became of the others."""

    samples: list[Sample]
    prompts: list[Blocks]
    dropped: Counter[str]
    num_trimmed: int
    first_long: str = ""


def encode_questions(
    engine: Engine, samples: Iterable[Sample], max_new_tokens: int, *, trim: bool, skip_bad: bool
) -> EncodedQuestions:
    """Encode all questions before the first is answered; those that are too long are left out and counted.

    If `trims`, they lose their least relevant documents first. With `skip_bad` those that are unfit for the
    chat template or the tokenizer are left out, too.

    Raises:
        UnfitText: the template or the tokenizer does not keep a text of a question, which is named.
    """
    fitting: list[Sample] = []
    prompts: list[Blocks] = []
    dropped, num_trimmed, first_long = Counter[str](), 0, ""
    for sample in samples:
        try:
            asked, blocks = engine.fit(sample, max_new_tokens, trim=trim)
        except PromptTooLong as error:
            dropped[TOO_LONG] += 1
            first_long = first_long or str(error)
        except TemplateMismatch as error:
            if not skip_bad:
                raise
            dropped[error.reason] += 1
        else:
            fitting.append(asked)
            # all wait in memory: 4 bytes a token, not a list's 36
            prompts.append([array("i", block) for block in blocks])
            num_trimmed += asked is not sample
    return EncodedQuestions(fitting, prompts, dropped, num_trimmed, first_long)


def answer_batch(
    engine: Engine, prompts: Sequence[Blocks], batch: Batch, *, mode: str, max_new_tokens: int
) -> list[AnswerRecord]:
    """The answers to the prompts of a batch."""
    # which blocks are packed together decides their last bits: after a kill it must be the same ones
    engine.forget()
    answers = engine.generate_ids([prompts[i] for i in batch], mode=mode, max_new_tokens=max_new_tokens)
    return [
        AnswerRecord(index, answer.text, answer.num_blocks, answer.prompt_tokens, len(answer.ids))
        for index, answer in zip(batch, answers, strict=True)
    ]


class AnswerFile:
    """The answers in one mode, in the order of the batches; only whole batches count.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, batches: Sequence[Batch]) -> None:
        self._path, self._batches = path, batches
        self.done: list[AnswerRecord] = []
        kept = 0
        if path.is_file():
            lines = _read_complete_lines(path.read_bytes())
            for batch in batches:
                answered = [one for _, one in zip(batch, lines, strict=False)]
                if tuple(one.index for one in answered) != batch:
                    break
                self.done += answered
                kept += sum(len(_to_json_line(one)) for one in answered)
            os.truncate(path, kept)

    @property
    def remaining_batches(self) -> Sequence[Batch]:
        """The batches to be answered still."""
        answered = {one.index for one in self.done}
        return [batch for batch in self._batches if batch[0] not in answered]

    def add(self, answered: Sequence[AnswerRecord]) -> None:
        """Append a batch; on return it is on the disk."""
        with self._path.open("ab") as file:
            file.write(b"".join(map(_to_json_line, answered)))
            file.flush()
            os.fsync(file.fileno())
        self.done += answered


def build_predictions(
    samples: Sequence[Sample], answered: Iterable[AnswerRecord], max_new_tokens: int
) -> list[Prediction]:
    """The predictions in the order of the data."""
    return [
        Prediction(
            id=samples[one.index].id,
            answer=one.answer,
            golds=samples[one.index].answers,
            groups=question_groups(samples[one.index]),
            num_blocks=one.num_blocks,
            prompt_tokens=one.prompt_tokens,
            num_tokens=one.num_tokens,
            hit_token_limit=one.num_tokens == max_new_tokens,
        )
        for one in sorted(answered, key=lambda one: one.index)
    ]


def question_groups(sample: Sample) -> tuple[str, ...]:
    """The source of a question, and its kinds within that source; none is called as all questions are."""
    source = sample.source if sample.source != ALL else f"source {ALL}"
    kinds = (f"{source}: {sample.meta[name]}" for name in GROUPS if name in sample.meta)
    return tuple(dict.fromkeys([source, *kinds]))


def _to_json_line(answered: AnswerRecord) -> bytes:
    return json.dumps(asdict(answered), ensure_ascii=False).encode() + b"\n"


def _read_complete_lines(content: bytes) -> Iterator[AnswerRecord]:
    """The answers up to the first line that a kill or a power cut left damaged."""
    for line in content.split(b"\n")[:-1]:
        try:
            yield AnswerRecord(**json.loads(line))
        except (ValueError, TypeError):
            return
