"""Settings of the teacher: check that they fit together and to the sources, and turn them into arguments."""

import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from blockft.config.choices import Format, Response, TooLongPolicy
from blockft.config.settings import DataSettings, Source, TeacherSettings
from blockft.data.files import RECORD_SUFFIXES, record_suffix
from blockft.data.rag_prompt import RagPrompt
from blockft.data.teacher_endpoint import Endpoint, request_body
from blockft.data.teacher_response import SupportCheck
from blockft.errors import UserError
from blockft.evaluation.metrics import normalize, substring_match, word_match
from blockft.stages.output_folder import check_output_place, source_inputs
from blockft.stages.source_kind import holds_questions, is_split

_ENDPOINT_SETTINGS = (
    "api_key_env",
    "extra_body",
    "concurrency",
    "requests_per_minute",
    "timeout_s",
    "max_retries",
)
_FIXED_FIELDS = ("model", "messages", "stream", "n")
"""Fields of a request that `data.teacher.extra_body` must not set."""

_SECRET_FIELD = re.compile("api_?key|authorization|password|secret", re.IGNORECASE)
"""Fields of a request whose values may be secrets. Some servers take a key there."""

_IN_MANIFEST = ("model", "revision", "prompt", "no_answer", "max_new_tokens", "temperature", "extra_body")
"""Settings of `data.teacher` that decide which answers a prepared folder holds."""


def uses_teacher(data: DataSettings) -> bool:
    """Return whether a source learns the teacher's answers."""
    return any(source.response is not Response.gold for source in data.sources)


def check_teacher(data: DataSettings) -> None:
    """Check the settings of the teacher, before anything is read or asked.

    Raises:
        UserError: a source needs a teacher and there is none, a source cannot have one, or settings of the
            teacher contradict each other.
    """
    for index, source in enumerate(data.sources):
        if source.response is not Response.gold:
            _check_source(f"data.sources[{index}].response", source, data)
    teacher = data.teacher
    if teacher is None:
        return
    if teacher.base_url is None:
        if teacher.api_key_env is not None:
            raise UserError(
                "data.teacher.api_key_env is set, but the teacher is a local model, because "
                "data.teacher.base_url is null: set data.teacher.base_url, or remove api_key_env"
            )
    elif teacher.revision is not None:
        raise UserError(
            f"data.teacher.revision is {teacher.revision!r}, but the endpoint decides which revision it "
            "serves: remove data.teacher.revision"
        )
    if teacher.prompt is not None:
        try:
            RagPrompt(**teacher.prompt.model_dump(mode="json"))
        except UserError as error:
            raise UserError(str(error).replace("data.prompt.", "data.teacher.prompt.")) from error
    if fixed := sorted({*_FIXED_FIELDS} & teacher.extra_body.keys()):
        raise UserError(
            f"data.teacher.extra_body sets {fixed[0]}, which prepare sets itself (so are "
            f"{', '.join(_FIXED_FIELDS)}): remove it"
        )
    if secret := next(filter(_SECRET_FIELD.search, sorted(teacher.extra_body)), None):
        raise UserError(
            f"data.teacher.extra_body sets {secret}, whose value the manifest would hold: export the key "
            "and name its environment variable in data.teacher.api_key_env"
        )
    if teacher.no_answer is not None and not normalize(teacher.no_answer):
        raise UserError(
            f"data.teacher.no_answer is {teacher.no_answer!r}, which no answer can be compared with: write a "
            "text with a word other than an article, such as NOT FOUND"
        )


def _check_source(key: str, source: Source, data: DataSettings) -> None:
    """Check that the responses of a source can be those of a teacher.

    Raises:
        UserError: they cannot.
    """
    if data.teacher is None:
        raise UserError(
            f"{key} is {source.response}, but data.teacher is null: set data.teacher.model, and "
            "data.teacher.base_url if an endpoint serves it"
        )
    if source.format is Format.blocks:
        raise UserError(
            f"{key} is {source.response}, but prompts of the format blocks already contain the chat template "
            "of one model: set it to gold"
        )
    if source.response is Response.teacher_with_gold and is_split(source):
        raise UserError(
            f"{key} is {source.response}, but the format {source.format} has no gold answers that an answer "
            "could contain: set it to teacher or gold"
        )
    if data.too_long is TooLongPolicy.trim:
        raise UserError(
            f"{key} is {source.response} and data.too_long is trim, which would drop documents that the "
            "teacher has read: set data.too_long to drop, and fit prompts into a row with data.num_documents"
        )


def teacher_settings_without_effect(data: DataSettings) -> list[str]:
    """Return one sentence for every changed setting of the teacher that has no effect."""
    teacher = data.teacher
    if teacher is None:
        return []
    if not uses_teacher(data):
        return ["data.teacher has no effect on data.sources: the response of all of them is gold"]
    found = []
    unused = ("batch_size",) if teacher.base_url is not None else _ENDPOINT_SETTINGS
    kind = "an endpoint" if teacher.base_url is not None else "a local model"
    for name in unused:
        if getattr(teacher, name) != TeacherSettings.model_fields[name].get_default():
            found.append(f"data.teacher.{name} has no effect: the teacher is {kind}")
    taught = [source for source in data.sources if source.response is not Response.gold]
    if teacher.prompt is not None and not any(map(holds_questions, taught)):
        found.append(
            "data.teacher.prompt has no effect on data.sources: all prompts that the teacher answers already "
            "contain their documents"
        )
    if teacher.no_answer is not None and all(map(is_split, taught)):
        found.append(
            "data.teacher.no_answer has no effect on data.sources: no prompt that the teacher answers has "
            "documents"
        )
    return found


def answers_path(data: DataSettings) -> Path:
    """Return the file of the teacher's answers.

    Raises:
        UserError: the file would lie in the prepared folder or in another folder of blockft, or a source
            would read it.
    """
    assert data.teacher
    given, out = data.teacher.answers_file, Path(data.output_dir)
    folder = Path(os.path.realpath(out))
    # the name of a path such as "." is that of no folder
    beside = out.with_name(f"{out.name}.answers.jsonl") if out.name == folder.name else None
    path = Path(given) if given is not None else beside or folder.with_name(f"{folder.name}.answers.jsonl")
    target = Path(os.path.realpath(path))
    if folder in (target, *target.parents):
        raise UserError(
            f"data.teacher.answers_file is {path}, inside of data.output_dir, which prepare replaces: choose "
            "a file outside of it"
        )
    for name, source in source_inputs("data.sources", data.sources).items():
        if _is_read(target, source):
            raise UserError(
                f"data.teacher.answers_file is {path}, which is a source file of {name} ({source}): choose a "
                "file elsewhere"
            )
    check_output_place(path, {}, {})
    return path


def _is_read(file: Path, source: str) -> bool:
    """Return whether a file, which may not exist yet, is one of those that a source reads."""
    path = os.path.realpath(source)
    if os.path.isdir(path):
        return str(file.parent) == path and record_suffix(file) in RECORD_SUFFIXES
    return str(file) == path or fnmatch(str(file), path)


def support_check(source: Source, teacher: TeacherSettings) -> SupportCheck:
    """Return the check of the teacher's answers to the prompts of a source."""
    return SupportCheck(
        needs_gold=source.response is Response.teacher_with_gold,
        no_answer=teacher.no_answer,
        contains=substring_match,
        contains_words=word_match,
    )


def no_answer_instruction(source: Source, data: DataSettings) -> str:
    """Return the text after the questions of a source that tells the teacher to write `no_answer`, or ""."""
    teacher = data.teacher
    assert teacher
    if teacher.no_answer is None:
        return ""
    wording = teacher.prompt or data.prompt
    is_told = teacher.no_answer in wording.instruction or teacher.no_answer in wording.question
    if holds_questions(source) and is_told:
        return ""
    return f"\nIf the documents do not contain the answer, write only: {teacher.no_answer}"


def build_endpoint(teacher: TeacherSettings) -> Endpoint:
    """Return the endpoint of the settings, with the key from the environment.

    Raises:
        UserError: the environment variable with the key is not set, or does not hold a key.
    """
    assert teacher.base_url
    return Endpoint(
        base_url=teacher.base_url,
        model=teacher.model,
        api_key=_read_key(teacher.api_key_env),
        body=request_body(teacher.max_new_tokens, teacher.temperature, teacher.extra_body),
        concurrency=teacher.concurrency,
        requests_per_minute=teacher.requests_per_minute,
        timeout_s=teacher.timeout_s,
        max_retries=teacher.max_retries,
    )


def _read_key(variable: str | None) -> str | None:
    # no message names the variable: a user may have written the key itself into the recipe
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise UserError(
            "the environment variable that data.teacher.api_key_env names is not set: export it with the key "
            "of the endpoint"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            "the environment variable that data.teacher.api_key_env names does not hold a key: it contains "
            "white space, or characters other than ASCII"
        )
    return key


def teacher_options(teacher: TeacherSettings) -> dict[str, Any]:
    """Return the settings of a teacher for the manifest: those that decide its answers, and no address."""
    options = teacher.model_dump(mode="json")
    return {name: options[name] for name in _IN_MANIFEST}
