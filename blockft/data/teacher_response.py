"""A teacher's answer becomes the response of a sample, or the reason to drop the sample."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from blockft.data.sample import Message, Sample
from blockft.data.teacher_answers import Finish, TeacherAnswer

NO_GOLD = "teacher answer without a gold answer"
NO_ANSWER = "teacher finds no answer in the documents"
EMPTY = "teacher answer is empty"
REASONING = "teacher answer contains its reasoning"
FAILED = "teacher has not answered"
TEMPLATED = "prompt already contains a chat template"

FINISH_REASONS = {
    Finish.length: "teacher answer is cut off",
    Finish.refused: "teacher refuses to answer",
    Finish.too_long: "prompt too long for the teacher",
    Finish.other: "teacher answer is no text",
}
"""The reasons to drop a sample because of how the teacher finished."""

REMEDIES = {
    NO_GOLD: "use a stronger teacher, or response: teacher",
    NO_ANSWER: "give the prompts more documents (data.num_documents, retriever), or use a stronger teacher",
    EMPTY: "change data.teacher.prompt, or use a stronger teacher",
    REASONING: (
        "turn it off (at an endpoint, for many models with data.teacher.extra_body={chat_template_kwargs: "
        "{enable_thinking: false}}), let the server separate it, or use a teacher that does not reason"
    ),
    FAILED: "run prepare again, with a higher data.teacher.max_retries or timeout_s",
    TEMPLATED: "set the response of this source to gold",
    FINISH_REASONS[Finish.length]: "raise data.teacher.max_new_tokens, or ask for shorter answers",
    FINISH_REASONS[Finish.refused]: "use a teacher without a content filter",
    FINISH_REASONS[Finish.too_long]: (
        "use fewer documents, a lower data.teacher.max_new_tokens, or a teacher with a longer context"
    ),
    FINISH_REASONS[Finish.other]: "use a model that answers with text",
}
"""What a user can change if many samples are dropped for a reason."""

_REASONING_MARKS = re.compile(
    r"^<(seed:)?(think|thinking|thought|reasoning)>|^\[THINK\]|^◁think▷"
    r"|</(seed:)?(think|thinking|thought|reasoning)>|\[/THINK\]|◁/think▷|<\|channel\|>|^analysis.*assistantfinal",
    re.DOTALL,
)
"""The marks that models write before and after their reasoning; the last two are those of gpt-oss."""

Match = Callable[[str, Sequence[str]], float]
"""A metric: takes an answer and the accepted texts, and returns 1 if it matches one of them."""


@dataclass(frozen=True, kw_only=True)
class SupportCheck:
    """The check of a teacher's answer against documents and gold answers.

    needs_gold: drop a sample whose teacher answer contains none of its gold answers.
    no_answer: the text that the teacher writes if the documents do not contain the answer.
    """

    needs_gold: bool
    no_answer: str | None
    contains: Match
    contains_words: Match


@dataclass(frozen=True)
class Dropped:
    """Why a sample is dropped: a reason that is counted, and the details of this sample."""

    reason: str
    details: str = ""


def teacher_messages(sample: Sample, no_answer_instruction: str) -> tuple[Message, ...]:
    """Return the messages that the teacher reads: those of the prompt, and perhaps an instruction at the end.

    Only a prompt with documents gets the instruction.
    """
    assert sample.messages
    if not no_answer_instruction or not sample.documents:
        return sample.messages
    *others, last = sample.messages
    final = last.content[-1] + no_answer_instruction
    return (*others, replace(last, content=(*last.content[:-1], final)))


def teacher_response(sample: Sample, answer: TeacherAnswer | None, check: SupportCheck) -> Sample | Dropped:
    """Return the sample with the teacher's answer as its response, or why it is dropped.

    answer: None if the teacher has not answered, not even after all retries.
    """
    if answer is None:
        return Dropped(FAILED)
    if answer.finish in FINISH_REASONS:
        return Dropped(FINISH_REASONS[answer.finish], answer.answer)
    response = answer.answer.strip()
    if not response:
        return Dropped(EMPTY)
    if _REASONING_MARKS.search(response):
        return Dropped(REASONING, response)
    if check.no_answer and sample.documents and check.contains_words(response, [check.no_answer]):
        return Dropped(NO_ANSWER, response)
    golds = sample.answers or [sample.response]
    if check.needs_gold and not check.contains(response, golds):
        return Dropped(NO_GOLD, f"{response!r} instead of {golds[0]!r}")
    return replace(sample, response=response, meta=sample.meta | {"response_by": "teacher"})
