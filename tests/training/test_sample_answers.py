"""Sample answers are the greedy answers of the model to its prompts, and leave the model as it was."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockft.attention.layout import Layout
from blockft.data.encoder import Example
from blockft.model.masked_forward import masked_logits
from blockft.training.sample_answers import (
    SampleAnswers,
    SamplePrompt,
    describe_repetition,
    format_answers,
)
from tests.run import save_tokenizer
from tests.tiny import build_model, random_ids, random_layout

CPU = torch.device("cpu")
END = frozenset(range(5, 25))


def make_examples(number: int) -> list[Example]:
    """Return examples with 1 to 4 blocks and 1 or 2 questions, each of which has an answer of two tokens."""
    rng = random.Random(0)
    examples = []
    for index in range(number):
        num_final = 1 + index % 2
        layout = random_layout(rng, rng.randint(30, 40), rng.randint(1, 4))
        layout = Layout((*layout.block_lengths, 5) if num_final == 2 else layout.block_lengths, num_final)
        if layout.final_lengths[0] < 4:
            layout = Layout((*layout.local_lengths, 9, *layout.final_lengths[1:]), num_final)
        ids = random_ids(rng, layout.num_tokens).numpy().astype(np.int32)
        ends = layout.context_len + np.cumsum(layout.final_lengths)
        examples.append(
            Example(
                input_ids=ids,
                label_spans=tuple((int(end) - 2, int(end)) for end in ends),
                block_lengths=layout.block_lengths,
                num_final=num_final,
                sample_ids=tuple(f"q{index}-{question}" for question in range(num_final)),
            )
        )
    return examples


def answer_alone(model: Any, prompt: SamplePrompt, mode: str, max_new_tokens: int) -> tuple[list[int], bool]:
    """Return the greedy answer to a prompt, with one forward pass over the growing text for each token."""
    ids: list[int] = []
    while len(ids) < max_new_tokens:
        layout = Layout((*prompt.local_lengths, len(prompt.question_ids) + len(ids)))
        layouts = [layout.full() if mode == "full" else layout]
        with torch.no_grad():
            logits = masked_logits(model, prompt.ids + ids, layouts, logits_to_keep=1)
        ids.append(int(logits[-1].argmax()))
        if ids[-1] in END:
            return ids[:-1], True
    return ids, False


def build_samples(prompts: list[SamplePrompt], row_len: int, folder: Path, **options: Any) -> SampleAnswers:
    options = {"steps": 1, "max_new_tokens": 12, "pad_id": 0, "reencoded": True, **options}
    return SampleAnswers(prompts, ["block", "full"], save_tokenizer(folder), END, row_len=row_len, **options)


@pytest.mark.parametrize("sees_first", [False, True])
@pytest.mark.parametrize("row_len", [64, 200, 500])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_answers_in_packed_rows_are_those_of_each_prompt_alone(
    name: str, row_len: int, sees_first: bool, tmp_path: Path
) -> None:
    prompts = [SamplePrompt.of_example(example, 3) for example in make_examples(5)]
    model = build_model(name).train()
    model.config.block_attention = {"local_sees_first": sees_first}
    row_len += 60 * sees_first
    state = torch.get_rng_state()
    answers = build_samples(prompts, row_len, tmp_path, local_sees_first=sees_first).answer(model, CPU)
    assert answers and [(a.prompt, a.mode) for a in answers] == [
        (i, m) for i in range(5) for m in ("block", "full")
    ]
    assert model.training and torch.equal(torch.get_rng_state(), state)
    for answer in answers:
        expected = answer_alone(model.eval(), prompts[answer.prompt], answer.mode, 12)
        assert (answer.ids, answer.ended) == expected
    assert sees_first or {answer.ended for answer in answers} == {True, False}
    num_different = len({tuple(answer.ids) for answer in answers})
    assert num_different > (2 if sees_first else 5), "the answers are hardly different"


def test_the_first_question_of_shared_documents_is_asked() -> None:
    example = make_examples(2)[1]
    prompt = SamplePrompt.of_example(example, 0)
    (start, end), _ = example.label_spans
    assert prompt.ids == example.input_ids[:start].tolist() and prompt.sample_id == "q1-0"
    assert prompt.expected_ids == example.input_ids[start:end].tolist()


def test_an_answer_has_no_more_tokens_than_its_row_has_space(tmp_path: Path) -> None:
    prompts = [SamplePrompt.of_example(example, 0) for example in make_examples(2)]
    row_len = max(len(prompt.ids) for prompt in prompts) + 3
    answers = build_samples(prompts, row_len, tmp_path).answer(build_model("llama"), CPU)
    assert answers
    for answer in answers:
        space = min(12, row_len - len(prompts[answer.prompt].ids))
        assert len(answer.ids) <= space and (answer.ended or len(answer.ids) == space)


def test_copies_leave_less_space_in_both_modes(tmp_path: Path) -> None:
    example = max(make_examples(5), key=lambda example: example.copy_len)
    prompt = SamplePrompt.of_example(example, 0)
    row_len = len(prompt.ids) + example.copy_len + 3
    samples = build_samples([prompt], row_len, tmp_path, local_sees_first=True)
    answers = samples.answer(build_model("llama"), CPU)
    assert example.copy_len and answers
    assert all(len(a.ids) <= 3 and (a.ended or len(a.ids) == 3) for a in answers)


def test_a_stop_at_any_token_gives_no_answers(tmp_path: Path) -> None:
    prompts = [SamplePrompt.of_example(example, 0) for example in make_examples(1)]
    samples, model = build_samples(prompts, 200, tmp_path), build_model("llama").train()
    calls = 0

    def stop_at_third() -> bool:
        nonlocal calls
        calls += 1
        return calls == 3

    assert samples.answer(model, CPU, is_stopped=stop_at_third) is None
    assert model.training


def test_endless_repetition_is_a_warning_and_a_regular_answer_is_none(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    texts = {"q0": (" no" * 9, False), "q1": (" no" * 9, True), "q2": ("Paris", False)}
    prompts, records = [], []
    for sample_id in texts:
        expected = tokenizer.encode("zero " * 8 if sample_id == "q0" else "7")
        prompts.append(SamplePrompt(sample_id, 0, [7], [8, 9], expected, (1,)))
    samples = SampleAnswers(
        prompts, ["full"], tokenizer, END, steps=1, max_new_tokens=99, row_len=999, pad_id=0, reencoded=True
    )
    from blockft.training.sample_answers import SampleAnswer

    answers = [
        SampleAnswer(number, "full", tokenizer.encode(text), ended)
        for number, (text, ended) in enumerate(texts.values())
    ]
    records = samples.describe(answers, 7)
    assert [record["repeated"] for record in records] == [None] * 3, (
        "the expected answer of q0 repeats itself"
    )
    assert describe_repetition(records) is None
    prompts[0] = SamplePrompt("q0", 0, [7], [8, 9], tokenizer.encode("7"), (1,))
    records = samples.describe(answers, 7)
    assert records[0]["repeated"] and [record["repeated"] for record in records[1:]] == [None, None]
    warning = describe_repetition(records)
    assert warning and "at step 7, 1 of 3 sample answers" in warning and "q0 in full mode" in warning
    lines = format_answers(records)
    assert len(lines) == 3 and lines[2] == 'step 7, sample q2: expected "7", full "Paris"'
