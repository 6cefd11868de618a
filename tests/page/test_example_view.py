"""What the page shows of an example: kinds of blocks, labels and text."""

from dataclasses import replace

import pytest

from blockft.data.encoder import Encoder, Example
from blockft.data.sample import Message, Sample
from blockft.data.shared_context import merge_shared_contexts
from blockft.page.example_view import ExampleView, view_example
from tests.data.toys import rag_sample, toy_tokenizer


def view(*samples: Sample) -> tuple[Example, ExampleView]:
    tokenizer = toy_tokenizer()
    examples = Encoder(tokenizer).encode(samples)
    example = next(merge_shared_contexts(iter(examples), 1024)) if len(samples) > 1 else examples[0]
    return example, view_example(example, samples, tokenizer, index=3, source="d.jsonl")


def text_of(view: ExampleView, *, labels: bool = False) -> list[str]:
    return [
        "".join(
            p.text for segment in block.segments for p in segment.pieces if segment.is_label or not labels
        )
        for block in view.blocks
    ]


def test_the_blocks_of_a_rag_prompt_have_kinds_and_colours() -> None:
    sample = rag_sample(meta={"documents": [1, 2], "supporting": [2]})
    example, shown = view(sample)
    kinds = ["template", "instruction", "document", "document with the answer", "final block"]
    assert [block.kind for block in shown.blocks] == kinds
    assert [block.style for block in shown.blocks] == ["template", "instruction", "shade0", "shade1", "final"]
    assert [block.num_tokens for block in shown.blocks] == list(example.block_lengths)
    assert text_of(shown)[2:4] == ["One.\n\n", "Two.\n\n"]
    assert text_of(shown, labels=True)[-1] == "The fox<|im_end|>"
    assert sum(block.num_labels for block in shown.blocks) == shown.num_labels == example.num_labels


def test_a_shared_context_has_a_final_block_per_question() -> None:
    samples = [rag_sample(f"Who {i}?", id=str(i)) for i in range(3)]
    example, shown = view(*samples)
    assert shown.sample_ids == ("0", "1", "2") and [b.kind for b in shown.blocks][-3:] == ["final block"] * 3
    assert text_of(shown, labels=True)[-3:] == ["The fox<|im_end|>"] * 3


def test_the_blocks_of_a_chat_have_the_roles_of_their_messages() -> None:
    messages = (
        Message(role="user", content=("Hello. ", "Who?")),
        Message(role="assistant", content=("Me.",)),
        Message(role="user", content=("And?",)),
    )
    _, shown = view(replace(rag_sample(), messages=messages, meta={}))
    kinds = [block.kind for block in shown.blocks if block.kind != "template"]
    assert kinds == ["user", "user", "assistant", "final block"]


def test_templated_blocks_and_unknown_samples_are_shown() -> None:
    templated = ("<|im_start|>user\nOne.", "Two.", "Who?")
    example, shown = view(replace(rag_sample(), messages=(), templated=templated, meta={}))
    assert [block.kind for block in shown.blocks] == ["block", "block", "final block"]
    unknown = view_example(example, [], toy_tokenizer(), index=0, source="d")
    assert len(unknown.blocks) == 3 and unknown.blocks[-1].kind == "final block"


@pytest.mark.parametrize("content", ["", "\n", "One."])
def test_equal_texts_do_not_confuse_the_kinds(content: str) -> None:
    documents = tuple(f"{content}{end}" or " " for end in ("\n\n", "\n\n"))
    _, shown = view(rag_sample(documents=documents, meta={"documents": [1, 2]}))
    assert [block.kind for block in shown.blocks][-4:] == [
        "instruction",
        "document",
        "document",
        "final block",
    ]
