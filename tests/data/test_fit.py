"""Which documents a sample or prompt loses when it is too long."""

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockft.data.encoder import Encoder
from blockft.data.fit import UNSPLIT, encode_samples, trim_document
from blockft.data.sample import Message, Sample
from blockft.data.split import split_sample
from tests.data.toys import rag_sample, toy_tokenizer


def trim_all(sample: Sample, *, keep_evidence: bool = False) -> list[str]:
    """Return the documents that are left after 0, 1, 2, ... trims."""
    left = []
    trimmed: Sample | None = sample
    while trimmed:
        left.append("".join(trimmed.blocks[i] for i in trimmed.documents))
        trimmed = trim_document(trimmed, keep_evidence=keep_evidence)
    return left


def ranked(relevance: list[float], supporting: tuple[int, ...] = ()) -> Sample:
    """A prompt whose documents are a, b, c, ..."""
    documents = tuple("abcdefgh"[: len(relevance)])
    meta = {"documents": list(range(1, len(relevance) + 1)), "relevance": relevance}
    return rag_sample(documents=documents, meta=meta | {"supporting": list(supporting)})


def test_training_data_loses_the_least_relevant_document_but_never_the_most_relevant() -> None:
    sample = rag_sample(documents=("gold", "x", "y"), meta={"documents": [1, 2, 3], "relevance": [1, 0, 0.5]})
    once = trim_document(sample, keep_evidence=True)
    assert once and once.blocks == ("Answer.\n\n", "gold", "y", "Who?")
    assert once.meta == {"documents": [1, 2], "relevance": [1, 0.5]}
    twice = trim_document(once, keep_evidence=True)
    assert twice and twice.blocks == ("Answer.\n\n", "gold", "Who?")
    assert trim_document(twice, keep_evidence=True) is None


@pytest.mark.parametrize(
    ("relevance", "supporting", "left"),
    [
        (None, [], ["abcd", "abc", "ab", "a"]),
        ([0, 0, 0, 0], [], ["abcd", "abc", "ab", "a"]),
        ([1, 0, 1, 0], [], ["abcd", "abc", "ac", "a"]),
        ([0.1, 0.2, 0.3, 0.4], [], ["abcd", "bcd", "cd", "d"]),
        ([0.1, 0.2, 0.3, 0.4], [1, 2], ["abcd", "abd", "ab", "b"]),
    ],
)
def test_a_prompt_loses_documents_by_relevance_then_from_the_end_and_evidence_last(
    relevance: list[float] | None, supporting: list[int], left: list[str]
) -> None:
    meta = {"documents": [1, 2, 3, 4], "supporting": supporting}
    meta |= {"relevance": relevance} if relevance else {}
    assert trim_all(rag_sample(documents=tuple("abcd"), meta=meta)) == left
    assert trim_document(rag_sample(documents=(), meta={})) is None


def test_training_data_keeps_the_documents_that_support_the_answer() -> None:
    meta = {"documents": [1, 2, 3], "relevance": [0.1, 0.9, 0.2], "supporting": [1]}
    sample = rag_sample(documents=("gold", "x", "y"), meta=meta)
    once = trim_document(sample, keep_evidence=True)
    assert once and once.blocks == ("Answer.\n\n", "gold", "x", "Who?")
    assert once.meta == {"documents": [1, 2], "relevance": [0.1, 0.9], "supporting": [1]}
    twice = trim_document(once, keep_evidence=True)
    assert twice and twice.blocks == ("Answer.\n\n", "gold", "Who?")
    assert trim_document(twice, keep_evidence=True) is None
    shifted = trim_document(replace(sample, meta=meta | {"supporting": [2, 3]}), keep_evidence=True)
    assert shifted and shifted.meta["supporting"] == [1, 2]


def test_training_data_without_relevance_keeps_all_documents() -> None:
    for supporting in ([], [1]):
        meta = {"documents": [1, 2], "supporting": supporting}
        assert trim_document(rag_sample(meta=meta), keep_evidence=True) is None


def test_among_equally_relevant_documents_the_last_one_goes_first_in_training_data() -> None:
    assert trim_all(ranked([0, 1, 0, 0, 1]), keep_evidence=True) == ["abcde", "abce", "abe", "be"]
    assert trim_all(ranked([0, 0, 0, 0], supporting=(2,)), keep_evidence=True) == ["abcd", "abc", "ab", "b"]


@given(st.lists(st.sampled_from([0, 0.5, 1]), min_size=1, max_size=6), st.data())
def test_training_data_and_prompts_lose_the_same_documents_in_the_same_order(
    relevance: list[float], data: st.DataObject
) -> None:
    supporting = data.draw(st.sets(st.integers(1, len(relevance))))
    sample = ranked(relevance, tuple(sorted(supporting)))
    prompts, training = trim_all(sample), trim_all(sample, keep_evidence=True)
    assert training == prompts[: len(training)]


def test_samples_of_one_block_are_dropped_if_only_those_that_split_are_wanted() -> None:
    encoder = Encoder(toy_tokenizer())
    texts = ["One.\n\nTwo.", "One.", "One.\n\nTwo.\n\nThree.", "Two."]
    samples = [
        Sample(id=text, source="toy", messages=(Message(role="user", content=(text,)),), response="x")
        for text in texts
    ]
    split = partial(split_sample, count_tokens=encoder.count_tokens, max_blocks=9, min_block_tokens=1)
    kept = encode_samples(samples, encoder, 99, trim=False, split=split)
    found = encode_samples(samples, encoder, 99, trim=False, split=split, drop_unsplit=True)
    assert [each.drop_reason for each in found] == ["", UNSPLIT, "", UNSPLIT]
    for one, other in zip(kept, found, strict=True):
        assert one.sample == other.sample and one.drop_reason == ""
        if other.example:
            assert one.example and list(one.example.input_ids) == list(other.example.input_ids)
