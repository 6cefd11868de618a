import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockft.data.encoder import Encoder
from blockft.data.sample import Message, Sample
from blockft.data.split import split_sample, split_text
from tests.data.toys import rag_sample

LINES = (
    "",
    " ",
    "---",
    "  ===\r",
    "\tindented",
    "    - item",
    "```",
    "```py",
    "~~~",
    "a ```b",
    "> ```",
    "two words",
)
ARBITRARY = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TEXTS = st.lists(st.sampled_from(LINES) | ARBITRARY, max_size=24).map("\n".join).filter(str.strip)
CHATS = st.lists(TEXTS, min_size=1, max_size=4).map(lambda texts: texts[: len(texts) - 1 + len(texts) % 2])
PLAIN = st.lists(ARBITRARY, min_size=1, max_size=4).map("\n".join).map(lambda t: re.sub("[`~]", "'", t))
FENCES = st.tuples(st.sampled_from(("```", "````", "~~~")), PLAIN).map(
    lambda f: f"{f[0]}py\n{f[1]}\n\n{f[0]}\n"
)


def count_words(texts: Sequence[str]) -> list[int]:
    return [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]


def chat(*texts: str, system: str = "") -> Sample:
    turns = [Message(role=("user", "assistant")[i % 2], content=(text,)) for i, text in enumerate(texts)]
    first = [Message(role="system", content=(system,))] if system else []
    return Sample(id="s", source="toy", messages=(*first, *turns), response="Yes.")


def split_blocks(text: str, min_block_tokens: int = 1) -> list[str]:
    return split_text(text, count_words, min_block_tokens=min_block_tokens)


def contents(sample: Sample, max_blocks: int = 16, min_block_tokens: int = 1) -> list[tuple[str, ...]]:
    found = split_sample(sample, count_words, max_blocks=max_blocks, min_block_tokens=min_block_tokens)
    assert found.response == sample.response
    return [message.content for message in found.messages]


@given(CHATS, st.integers(1, 6), st.integers(1, 5))
def test_splitting_keeps_the_text_and_the_bounds(
    texts: list[str], max_blocks: int, min_block_tokens: int
) -> None:
    sample = chat(*texts, system="Be brief.\n\nBe kind.")
    found = contents(sample, max_blocks, min_block_tokens)
    assert ["".join(content) for content in found] == [message.text for message in sample.messages]
    assert found[0] == (sample.messages[0].text,), "the system message stays one block"
    assert sum(map(len, found)) <= max(max_blocks, len(found))
    for content in found:
        assert all(block.strip() for block in content), "no block is blank"
        assert len(content) == 1 or min(count_words(content)) >= min_block_tokens


@given(CHATS, st.integers(1, 6))
def test_splitting_twice_changes_nothing(texts: list[str], max_blocks: int) -> None:
    once = split_sample(chat(*texts), count_words, max_blocks=max_blocks, min_block_tokens=2)
    assert split_sample(once, count_words, max_blocks=max_blocks, min_block_tokens=2) == once


@given(st.lists(PLAIN | FENCES, max_size=6), st.booleans())
def test_a_code_block_is_never_split(parts: list[str], ends_open: bool) -> None:
    parts = [
        part if part.endswith("\n") else f"{part}\n"
        for part in [*parts, "```py\n1\n\n2\n"][: None if ends_open else -1]
    ]
    starts = {0}
    for block in split_blocks("".join(parts)):
        starts.add(max(starts) + len(block))
    start = 0
    for part in parts:
        if part.startswith(("```", "~~~")):
            assert starts.isdisjoint(range(start + 1, start + len(part)))
        start += len(part)


@given(TEXTS)
def test_blocks_have_enough_tokens_as_the_tokenizer_counts(encoder: Encoder, text: str) -> None:
    sample = split_sample(chat(text), encoder.count_tokens, max_blocks=16, min_block_tokens=3)
    assert min(encoder.count_tokens(sample.blocks)) >= (3 if len(sample.blocks) > 1 else 1)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("one line", ["one line"]),
        ("a\n \n\n  b\nc\n\nd", ["a\n \n\n", "  b\nc\n\n", "d"]),
        ("a\r\n\r\nb", ["a\r\n\r\n", "b"]),
        ("a\n\n---\n\nb", ["a\n\n---\n\n", "b"]),
        ("a\n---\nb\nc\n=====\nd", ["a\n---\n", "b\nc\n=====\n", "d"]),
        ("a -- b\n|---|---|", ["a -- b\n", "|---|---|"]),
        ("a\n\tb\nc\n    d", ["a\n", "\tb\nc\n", "    d"]),
        ("a\nb\n", ["a\n", "b\n"]),
        ("\n\n---\na\n\nb\n\n", ["\n\n---\na\n\n", "b\n\n"]),
        ("---\n===\n", ["---\n===\n"]),
        ("see:\n```\na\n\nb\n```\nso", ["see:\n", "```\na\n\nb\n```\n", "so"]),
        ("a\n\n~~~\nb\n\n```\n\nc", ["a\n\n", "~~~\nb\n\n```\n\nc"]),
        ("````\n```\n\na\n````\n\nb", ["````\n```\n\na\n````\n\n", "b"]),
        ("mend ```x = 1\n\ny```\n\nb", ["mend ```x = 1\n\ny```\n\n", "b"]),
        ("a ```x``` b\n\nc", ["a ```x``` b\n\n", "c"]),
    ],
)
def test_the_strongest_separator_that_splits_is_used(text: str, blocks: list[str]) -> None:
    assert split_blocks(text) == blocks


def test_a_short_block_is_merged_with_the_next_and_the_last_with_the_one_before() -> None:
    assert split_blocks("Title\n\none two three\n\nfour five six\n\nend", 3) == [
        "Title\n\none two three\n\n",
        "four five six\n\nend",
    ]
    assert split_blocks("a\n\nb\n\nc", 2) == ["a\n\nb\n\nc"]
    assert split_blocks("Title\n\none two\nthree four", 2) == ["Title\n\none two\n", "three four"]


def test_the_two_shortest_adjacent_blocks_of_a_message_are_merged_first() -> None:
    sample = chat("a a a\n\nb\n\nc\n\nd d d d d", "hm", "who\n\nor why")
    assert contents(sample, 6) == [("a a a\n\n", "b\n\nc\n\n", "d d d d d"), ("hm",), ("who\n\n", "or why")]
    assert contents(sample, 1) == [("a a a\n\nb\n\nc\n\nd d d d d",), ("hm",), ("who\n\nor why",)]


def test_samples_with_marked_blocks_are_unchanged() -> None:
    marked = rag_sample("Who?\n\nAnd why?")
    one = replace(marked, messages=(Message(role="user", content=("a\n\nb",)),), meta={"documents": [0]})
    templated = Sample(id="s", source="toy", templated=("a\n\nb",), response="c")
    for sample in (marked, one, templated):
        assert split_sample(sample, count_words, max_blocks=16, min_block_tokens=1) is sample
