import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockft.data.chat_formats import parse_blocks
from blockft.data.leaks import NO_DOCUMENTS, LeakFinder, hash_sample, normalize_words, to_hashes
from blockft.data.rag_prompt import Document, RagPrompt
from blockft.data.sample import Message, Sample
from tests.data.toys import rag_sample

DOCUMENTS = [Document(title=name, text=f"{name} is here.") for name in ("Ada", "Bob", "Eve")]


def ask(text: str, documents: list[Document] = DOCUMENTS, **wording: str) -> Sample:
    messages, meta = RagPrompt(order="given", **wording).build(text, documents, "s")
    return Sample(id="s", source="toy", messages=messages, response="x", meta=meta)


def chat(*texts: str, system: str = "") -> Sample:
    roles = ("user", "assistant")
    turns = [Message(role=roles[i % 2], content=(text,)) for i, text in enumerate(texts)]
    first = [Message(role="system", content=(system,))] if system else []
    return Sample(id="c", source="toy", messages=(*first, *turns), response="x")


@pytest.mark.parametrize(
    "variant",
    [
        "who is the  KING of Spain",
        " Who is “the king” of Spain?? ",
        "Who is the king\u00a0of\nSpain ?",
        "Ｗho is the king of Spain?",
        "Who is the ki\u00adng of\u200b Spain?",
    ],
)
def test_a_question_is_the_same_in_other_case_white_space_punctuation_and_characters(variant: str) -> None:
    assert hash_sample(ask(variant)) == hash_sample(ask("Who is the king of Spain?"))


@pytest.mark.parametrize(
    ("one", "other"),
    [("What is C?", "What is C++?"), ("2/3 = x", "23 = x"), ("Who won?", "Who won it?"), ("किताब", "कताब")],
)
def test_questions_with_other_words_or_symbols_differ(one: str, other: str) -> None:
    assert hash_sample(ask(one)) != hash_sample(ask(other))


def test_texts_without_words_differ_by_their_characters() -> None:
    assert len({hash_sample(ask(question))[0] for question in ("?", "!", "…", "。")}) == 4


def test_wording_and_instruction_do_not_change_a_question() -> None:
    own = "Ask: {question} (say {{it}})"
    hashes = {
        hash_sample(ask("Who, {me}?"), own),
        hash_sample(ask("Who, {me}?", question=own), own),
        hash_sample(ask("Who, {me}?", question="Q {question}", instruction="Go."), "Q {question}"),
        hash_sample(ask("Who, {me}?", documents_in="system")),
        hash_sample(ask("Who, {me}?"), "Question: {question}"),
    }
    assert len({question for question, _ in hashes}) == 1
    assert len(hashes) == 1
    assert hash_sample(ask("Who, {me}?", documents=[]), own) == (next(iter(hashes))[0], NO_DOCUMENTS)
    assert hash_sample(chat("Who, {me}?"), own) == (next(iter(hashes))[0], NO_DOCUMENTS)


def test_documents_are_compared_as_a_set() -> None:
    question, documents = hash_sample(ask("Who?"))
    assert hash_sample(ask("Who?", DOCUMENTS[::-1])) == (question, documents)
    assert hash_sample(ask("Who?", [*DOCUMENTS, DOCUMENTS[0]])) == (question, documents)
    assert hash_sample(ask("Where?"))[1] == documents
    others = [
        DOCUMENTS[:2],
        DOCUMENTS[1:],
        DOCUMENTS[:1],
        [replace(DOCUMENTS[0], text="gone"), *DOCUMENTS[1:]],
    ]
    assert len({documents, *(hash_sample(ask("Who?", other))[1] for other in others)}) == 5


def test_local_blocks_are_the_documents_of_a_sample_that_marks_none() -> None:
    unmarked = rag_sample(meta={})
    assert hash_sample(unmarked)[0] == hash_sample(rag_sample())[0]
    assert hash_sample(unmarked)[1] not in (hash_sample(rag_sample())[1], NO_DOCUMENTS)
    templated = Sample(id="t", source="toy", templated=("<user>", "One.", "Who?"), response="x")
    turned = replace(templated, templated=("One.", "<user>", "Who?"))
    assert hash_sample(templated) == hash_sample(turned)
    assert hash_sample(replace(templated, meta={"documents": []}))[1] == NO_DOCUMENTS


def test_the_question_of_a_templated_prompt_is_found_in_its_record() -> None:
    record = {
        "prompt": "<|user|>\n- Title: A\nOne.\nAnswer this. Question: Who?<|assistant|>\n",
        "documents": [{"title": "A", "text": "One."}],
        "question": "who",
        "generated": "The fox",
        "answers": ["fox"],
    }
    for changes in ({}, {"train_block": False}):
        (sample,) = parse_blocks(record | changes, "b")
        assert hash_sample(sample)[0] == hash_sample(ask("Who?"))[0]
    (unknown,) = parse_blocks(record | {"question": ""}, "b")
    assert hash_sample(unknown)[0] != hash_sample(ask("Who?"))[0]


def test_a_chat_is_its_turns_without_the_system_message() -> None:
    long = chat("Hi", "Hello", "Who?", system="Be brief.")
    assert hash_sample(long) == hash_sample(replace(chat("Hi!", "hello", "who"), id="d"))
    assert len({hash_sample(long), hash_sample(chat("Hi")), hash_sample(chat("Who?"))}) == 3


@given(st.text())
def test_normalizing_twice_changes_nothing_and_ascii_has_no_rule_of_its_own(text: str) -> None:
    words = normalize_words(text).decode()
    assert normalize_words(words).decode() == words
    assert normalize_words(text + "é").decode() in (f"{words}é", f"{words} é") or not any(
        unicodedata.category(char)[0] in "LNMS" for char in text
    )


@given(st.text(alphabet=st.characters(max_codepoint=127)), st.text())
def test_hashes_are_64_bit_and_never_zero(question: str, document: str) -> None:
    hashes = hash_sample(rag_sample(question, (document,)))
    assert all(0 < value < 1 << 64 for value in hashes)


def find(
    evaluation: list[list[tuple[int, int]]], training: list[list[tuple[int, int]]], portion: int = 1000
) -> LeakFinder:
    finder = LeakFinder(
        [([f"e{i}" for i in range(len(pairs))], to_hashes(pairs)) for pairs in evaluation], len(training)
    )
    for source, pairs in enumerate(training):
        for start in range(0, len(pairs), portion):
            finder.add(
                source, to_hashes(pairs[start : start + portion]), lambda i, start=start: f"t{start + i}"
            )
    return finder


def test_questions_and_documents_of_each_pair_of_sources_are_counted() -> None:
    evaluation = [[(1, 10), (2, 0), (1, 11), (3, 12)], [(9, 90)], [(1, 99)]]
    training = [[(5, 50), (1, 12), (1, 0), (6, 0)], [(7, 0)], [(8, 90), (9, 90), (2, 0)]]
    found = [
        (leak.evaluation_source, leak.training_source, leak.num_questions, leak.num_documents, leak.examples)
        for leak in find(evaluation, training).leaks()
    ]
    assert found == [
        (0, 0, 2, 1, (("e0", "t1"), ("e3", "t1"))),
        (0, 2, 1, 0, (("e1", "t2"),)),
        (1, 2, 1, 1, (("e0", "t1"), ("e0", "t0"))),
        (2, 0, 1, 0, (("e0", "t1"),)),
    ]


def test_samples_without_documents_have_no_documents_in_common() -> None:
    assert find([[(1, NO_DOCUMENTS)]], [[(2, NO_DOCUMENTS)]]).leaks() == []
    assert find([], [[(2, NO_DOCUMENTS)]]).leaks() == []
    assert find([[]], [[]]).leaks() == []


def test_duplicates_are_counted_over_all_training_sources_but_not_between_copies() -> None:
    finder = find([], [[(1, 2), (1, 2), (1, 3), (4, 0)], [(4, 0), (5, 2)]])
    assert finder.count_duplicates() == (3, 2)
    finder.add(0, to_hashes([(1, 2), (9, 9)]), str, is_copy=True)
    assert finder.count_duplicates() == (3, 2)


HASHES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=30)


@given(st.lists(HASHES, max_size=3), st.lists(HASHES, max_size=3), st.integers(1, 40))
def test_leaks_equal_those_of_a_plain_search_for_any_portions(
    evaluation: list[list[tuple[int, int]]], training: list[list[tuple[int, int]]], portion: int
) -> None:
    finder = find(evaluation, training, portion)
    assert finder.leaks() == find(evaluation, training).leaks()
    counts = {
        (leak.evaluation_source, leak.training_source): (leak.num_questions, leak.num_documents)
        for leak in finder.leaks()
    }
    for e, samples in enumerate(evaluation):
        for t, learned in enumerate(training):
            questions = sum(q in {learned_q for learned_q, _ in learned} for q, _ in samples)
            documents = sum(d in {learned_d for _, learned_d in learned} for _, d in samples if d)
            assert counts.get((e, t), (0, 0)) == (questions, documents)
    pairs = [pair for source in training for pair in source]
    assert finder.count_duplicates() == (len(pairs) - len({q for q, _ in pairs}), len(pairs) - len({*pairs}))
