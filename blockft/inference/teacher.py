"""A local model as a teacher: it answers questions in batches with full attention."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from blockft.data.chat_template import TemplateMismatch
from blockft.data.fit import PromptTooLong
from blockft.data.sample import Sample
from blockft.data.teacher_answers import Finish, Question, TeacherAnswer
from blockft.data.tokenizer import tokenizer_fingerprint
from blockft.inference.engine import Engine
from blockft.inference.sampling import Sampler
from blockft.model.fingerprint import model_fingerprint

WINDOW_BATCHES = 16
"""Questions are sorted by length within windows of this many batches."""


def engine_identity(engine: Engine) -> dict[str, Any]:
    """Return what identifies a local teacher: its weights as loaded, and its tokenizer with the template."""
    return {
        "weights": model_fingerprint(engine.model),
        "dtype": str(engine.model.dtype),
        "tokenizer": tokenizer_fingerprint(engine.tokenizer),
    }


def plan_teacher_batches(
    questions: Iterable[Question], batch_size: int, is_answered: Callable[[str], bool]
) -> Iterator[list[Question]]:
    """Yield the batches of questions without an answer, with questions of similar length together.

    The other questions of a batch change the rounding of an answer. So the batches are those of all
    questions, also of the answered ones, which are then left out: whatever batches were answered before an
    interruption, the others stay as they are.
    """
    questions = iter(questions)
    while window := list(islice(questions, WINDOW_BATCHES * batch_size)):
        window.sort(key=lambda question: sum(len(message.text) for message in question.messages))
        for start in range(0, len(window), batch_size):
            batch = [q for q in window[start : start + batch_size] if not is_answered(q.key)]
            if batch:
                yield batch


def ask_engine(
    engine: Engine,
    batch: Sequence[Question],
    *,
    max_new_tokens: int,
    temperature: float,
    skip: Callable[[Question, str], None] | None = None,
) -> list[TeacherAnswer]:
    """Answer a batch of questions in full mode. The answers do not depend on the batches before.

    skip: called with a question that the template or the tokenizer changes, and the reason. None raises an
        error instead.

    Raises:
        TemplateMismatch: the template or the tokenizer of the teacher changes a question.
    """
    prompts: dict[str, list[list[int]]] = {}
    answers = []
    for question in batch:
        prompt = Sample(
            id=question.sample,
            source="teacher",
            messages=question.messages,
            response="",
            meta={"documents": list(question.documents)},
        )
        try:
            prompts[question.key] = engine.encode(prompt, max_new_tokens)
        except PromptTooLong:
            answers.append(_build_answer(question.key, finish=Finish.too_long))
        except TemplateMismatch as error:
            if skip is None:
                raise
            skip(question, str(error))
    # a seed of its own for each batch, so that batches may be answered in any order
    sampler = Sampler(temperature, seed=int(batch[0].key[:8], 16))
    found = engine.generate_ids(
        [*prompts.values()], mode="full", max_new_tokens=max_new_tokens, sampler=sampler
    )
    for key, answer in zip(prompts, found, strict=True):
        is_cut = len(answer.ids) == max_new_tokens
        answers.append(
            _build_answer(
                key,
                answer.text,
                finish=Finish.length if is_cut else Finish.stop,
                prompt_tokens=answer.prompt_tokens,
                answer_tokens=len(answer.ids),
            )
        )
    return answers


def _build_answer(
    key: str, answer: str = "", *, finish: Finish, prompt_tokens: int = 0, answer_tokens: int = 0
) -> TeacherAnswer:
    return TeacherAnswer(
        key=key, answer=answer, finish=finish, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens
    )
