"""The answers of a teacher in `prepare`: ask the questions without an answer, and build the responses."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from blockft.config.choices import BadRecordPolicy, Response
from blockft.config.settings import DataSettings, Recipe, Source, TeacherSettings
from blockft.data.chat_template import TemplateMismatch
from blockft.data.sample import SKIP_REMEDY, Sample
from blockft.data.sources import RecordCounts
from blockft.data.teacher_answers import AnswersFile, Question, TeacherAnswer, question_key
from blockft.data.teacher_endpoint import QuestionFailed, ask_endpoint, request_body
from blockft.data.teacher_response import (
    FAILED,
    TEMPLATED,
    Dropped,
    SupportCheck,
    teacher_messages,
    teacher_response,
)
from blockft.digest import digest_json
from blockft.errors import UserError, notify
from blockft.folder_lock import lock_folder
from blockft.progress import progress
from blockft.stages.source_kind import holds_questions
from blockft.stages.teacher_settings import (
    answers_path,
    build_endpoint,
    no_answer_instruction,
    support_check,
)
from blockft.units import format_count

Read = Callable[[int, DataSettings], Iterable[Sample]]
"""Reads the samples of the source with an index, in the wording of the settings. It is called repeatedly."""

Skip = Callable[[Question, str], None]
"""Takes a question that failed, and the reason."""


@dataclass(frozen=True, kw_only=True)
class SourceQuestions:
    """The questions of one source.

    source: its settings.
    instruction: what is appended to its questions; see `no_answer_instruction`.
    keys: the key of every question.
    teacher_keys: the key of a question by `_prompt_key` of the prompt to train on; None if the teacher reads
        that prompt itself.
    """

    source: Source
    instruction: str
    keys: set[str] = field(default_factory=set)
    teacher_keys: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherResponses:
    """The teacher's answers to the samples of all sources. Worker processes may use a forked copy.

    sources: the questions by the index of their source; a source with gold responses has none.
    answers: all answers by key.
    failures: why questions have no answer, by key.
    identity: see `question_key`.
    num_asked: the number of questions that were asked, and not found in the file of answers.
    """

    sources: Mapping[int, SourceQuestions] = field(default_factory=dict)
    checks: Mapping[int, SupportCheck] = field(default_factory=dict)
    answers: Mapping[str, TeacherAnswer] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    num_asked: int = 0

    def respond(self, index: int, sample: Sample) -> Sample | Dropped:
        """Return a sample of source `index` with the response to learn, or why it is dropped.

        A source with gold responses keeps its samples as they are.
        """
        questions = self.sources.get(index)
        if questions is None:
            return sample
        if sample.templated:
            return Dropped(TEMPLATED)
        key = _question_key(sample, questions, self.identity)
        if key in self.failures:
            return Dropped(FAILED, self.failures[key])
        return teacher_response(sample, self.answers.get(key), self.checks[index])

    def respond_all(self, index: int, samples: Iterable[Sample], counts: RecordCounts) -> Iterator[Sample]:
        """Yield the samples of source `index` with the responses to learn; count those that are dropped."""
        for sample in samples:
            response = self.respond(index, sample)
            if isinstance(response, Sample):
                yield response
                continue
            example = f"sample {sample.id}{response.details and f': {response.details}'}"
            counts.drop(response.reason, partial(str, example))
            if response.reason in (FAILED, TEMPLATED):
                counts.list_bad(example)

    def digest(self, index: int) -> str:
        """Return a digest of all that decides what `respond` returns for source `index`; "" for gold."""
        questions = self.sources.get(index)
        if questions is None:
            return ""
        answers = [
            [key, self.answers[key].answer, self.answers[key].finish] for key in self._answered(questions)
        ]
        check = self.checks[index]
        return digest_json([check.needs_gold, check.no_answer, questions.instruction, answers])

    def describe(self, index: int) -> dict[str, Any]:
        """Return what the manifest says about the teacher's answers to source `index`; empty for gold."""
        questions = self.sources.get(index)
        if questions is None:
            return {}
        answers = [self.answers[key] for key in self._answered(questions)]
        return {
            "teacher": {
                "questions": len(questions.keys),
                "answered": len(answers),
                "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
                "answer_tokens": sum(answer.answer_tokens for answer in answers),
            }
        }

    def _answered(self, questions: SourceQuestions) -> list[str]:
        return sorted(key for key in questions.keys if key in self.answers)


def ask_teacher(recipe: Recipe, read: Read) -> TeacherResponses:
    """Ask the teacher every question that has no answer yet, and return its answers to all samples.

    The answers are kept in a file, see `answers_path`: the next call asks only the questions that are not in
    it. Without a source whose response is the teacher's, nothing is read.

    Raises:
        UserError: a prompt cannot be asked, the teacher cannot be reached or loaded, or another process uses
            the file. All answers so far are kept.
    """
    data = recipe.data
    taught = [index for index, source in enumerate(data.sources) if source.response is not Response.gold]
    if not taught:
        return TeacherResponses()
    assert data.teacher
    path = answers_path(data)
    with lock_folder(path, "blockft prepare"), _open_teacher(recipe) as teacher:
        file = AnswersFile(path)
        with progress("read questions", unit="sample") as advance:
            sources = {i: _collect_questions(i, data, read, teacher.identity, advance) for i in taught}
        failures: dict[str, str] = {}
        missing = {key for questions in sources.values() for key in questions.keys} - file.answers.keys()
        if missing:
            questions = _all_questions(sources, data, read, teacher.identity)
            _ask_missing(teacher, questions, len(missing), file, failures, data)
        file.sort()
    checks = {index: support_check(data.sources[index], data.teacher) for index in taught}
    return TeacherResponses(
        sources=sources,
        checks=checks,
        answers=file.answers,
        failures=failures,
        identity=teacher.identity,
        num_asked=len(missing),
    )


def _ask_missing(
    teacher: "_LocalTeacher | _RemoteTeacher",
    questions: Iterator[Question],
    num_missing: int,
    file: AnswersFile,
    failures: dict[str, str],
    data: DataSettings,
) -> None:
    """Ask the questions that are not in the file, and add their answers to it.

    Raises:
        UserError: see `ask_teacher`. The message says how many answers are kept.
    """
    num_before, tokens = len(file.answers), [0, 0]

    def fail(question: Question, reason: str) -> None:
        failures[question.key] = reason
        advance()

    def record(batch: Sequence[TeacherAnswer]) -> None:
        file.add(batch)
        tokens[0] += sum(answer.prompt_tokens for answer in batch)
        tokens[1] += sum(answer.answer_tokens for answer in batch)
        advance(len(batch), note=f"{tokens[0]:,} + {tokens[1]:,} tokens")

    skip = fail if data.on_bad_record is BadRecordPolicy.skip else None
    try:
        with progress("teacher", num_missing, unit="question") as advance:
            teacher.ask(questions, file.answers, record, skip)
    except QuestionFailed as error:
        raise UserError(f"{error} {SKIP_REMEDY}; {_resume_remark(file)}") from error
    except TemplateMismatch as error:
        raise UserError(f"data.teacher.model: {error} {SKIP_REMEDY}") from error
    except UserError as error:
        raise UserError(f"{error}; {_resume_remark(file)}") from error
    except KeyboardInterrupt:
        notify(f"interrupted: {_resume_remark(file)}")
        raise
    failed = ""
    if failures:
        first = next(iter(failures.values()))
        failed = f", {format_count(len(failures), 'question')} failed (the first one: {first})"
    found = format_count(len(file.answers) - num_before, "new answer")
    notify(
        f"teacher: {found}, {tokens[0]:,} prompt tokens and {tokens[1]:,} answer tokens{failed}; "
        f"all answers are in {file.path}"
    )


def _resume_remark(file: AnswersFile) -> str:
    if not file.answers:
        return "no question was answered so far"
    return f"{file.path} keeps {format_count(len(file.answers), 'answer')}, and the same command resumes"


# --- questions


def _collect_questions(
    index: int, data: DataSettings, read: Read, identity: Mapping[str, Any], advance: Callable[[], None]
) -> SourceQuestions:
    """Read a source and return the keys of its questions.

    Raises:
        UserError: a prompt is templated, and `data.on_bad_record` is error.
    """
    source = data.sources[index]
    questions = SourceQuestions(
        source=source,
        instruction=no_answer_instruction(source, data),
        teacher_keys={} if _has_own_wording(source, data) else None,
    )
    for sample, asked in _read_pairs(source, index, data, read):
        advance()
        if sample.templated:
            if data.on_bad_record is BadRecordPolicy.skip:
                continue
            raise UserError(
                f"sample {sample.id} of {source.path} already contains a chat template, so that a teacher "
                f"cannot answer it: set data.sources[{index}].response to gold {SKIP_REMEDY}"
            )
        key = question_key(teacher_messages(asked, questions.instruction), identity)
        questions.keys.add(key)
        if questions.teacher_keys is not None:
            questions.teacher_keys.setdefault(_prompt_key(sample), key)
    return questions


def _all_questions(
    sources: Mapping[int, SourceQuestions], data: DataSettings, read: Read, identity: Mapping[str, Any]
) -> Iterator[Question]:
    """Yield every question of all sources once, in the order of the sources."""
    seen = set[str]()
    for index, questions in sources.items():
        for _, asked in _read_pairs(questions.source, index, data, read):
            if asked.templated:
                continue
            messages = teacher_messages(asked, questions.instruction)
            key = question_key(messages, identity)
            if key not in seen:
                seen.add(key)
                name = f"{asked.id} of {asked.source}"
                yield Question(key=key, messages=messages, documents=asked.documents, sample=name)


def _read_pairs(
    source: Source, index: int, data: DataSettings, read: Read
) -> Iterator[tuple[Sample, Sample]]:
    """Yield the samples of a source, each as it is trained on and as the teacher reads it."""
    if not _has_own_wording(source, data):
        yield from ((sample, sample) for sample in read(index, data))
        return
    assert data.teacher
    reworded = read(index, data.model_copy(update={"prompt": data.teacher.prompt}))
    # the wording changes neither the choice nor the order of questions and documents
    for sample, asked in zip(read(index, data), reworded, strict=True):
        assert sample.id == asked.id and len(sample.documents) == len(asked.documents)
        yield sample, asked


def _has_own_wording(source: Source, data: DataSettings) -> bool:
    assert data.teacher
    return holds_questions(source) and data.teacher.prompt not in (None, data.prompt)


def _question_key(sample: Sample, questions: SourceQuestions, identity: Mapping[str, Any]) -> str:
    """Return the key of the question that belongs to a sample."""
    if questions.teacher_keys is not None:
        return questions.teacher_keys[_prompt_key(sample)]
    return question_key(teacher_messages(sample, questions.instruction), identity)


def _prompt_key(sample: Sample) -> str:
    return question_key(sample.messages, {"id": sample.id})


# --- teachers


class _RemoteTeacher:
    """A teacher behind an endpoint. Its address does not belong to its identity."""

    def __init__(self, settings: TeacherSettings) -> None:
        self._settings = settings
        body = request_body(settings.max_new_tokens, settings.temperature, settings.extra_body)
        self.identity: dict[str, Any] = {"endpoint model": settings.model, "body": body}

    def ask(
        self,
        questions: Iterator[Question],
        answers: Mapping[str, TeacherAnswer],
        record: Callable[[Sequence[TeacherAnswer]], None],
        skip: Skip | None,
    ) -> None:
        missing = (question for question in questions if question.key not in answers)
        ask_endpoint(build_endpoint(self._settings), missing, lambda answer: record([answer]), skip)


class _LocalTeacher:
    """A model that this process holds."""

    def __init__(self, settings: TeacherSettings, chat_template: str | None) -> None:
        from blockft.inference.engine import Engine
        from blockft.inference.teacher import engine_identity

        self._settings = settings
        self.engine = Engine.load(settings.model, revision=settings.revision, chat_template=chat_template)
        options = {"max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature}
        self.identity: dict[str, Any] = engine_identity(self.engine) | options

    def ask(
        self,
        questions: Iterator[Question],
        answers: Mapping[str, TeacherAnswer],
        record: Callable[[Sequence[TeacherAnswer]], None],
        skip: Skip | None,
    ) -> None:
        from blockft.inference.teacher import ask_engine, plan_teacher_batches

        settings = self._settings
        for batch in plan_teacher_batches(questions, settings.batch_size, lambda key: key in answers):
            record(
                ask_engine(
                    self.engine,
                    batch,
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    skip=skip,
                )
            )


@contextmanager
def _open_teacher(recipe: Recipe) -> Iterator[_LocalTeacher | _RemoteTeacher]:
    """Open the teacher of a recipe.

    Raises:
        UserError: a local model cannot be loaded.
    """
    settings = recipe.data.teacher
    assert settings
    if settings.base_url is not None:
        yield _RemoteTeacher(settings)
        return
    # a file with a template replaces that of the recipe's model, and of no other one
    template = recipe.model.chat_template if settings.model == recipe.model.path else None
    teacher = _LocalTeacher(settings, template)
    with teacher.engine:
        yield teacher
