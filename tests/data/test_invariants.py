"""Invariants of encoding over arbitrary texts, for the chat templates of real model families.

The ids of a block depend only on its text and markup. The concatenated blocks equal the rendered prompt. Text
from data never becomes an added token.
"""

import unicodedata
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockft.data.chat_template import ChatTemplate, TextPart
from blockft.data.encoder import IGNORE_INDEX, Encoder
from blockft.data.sample import Message, Sample
from blockft.data.tokenizer import PlainTokenizer, encode_markup
from tests.data.families import BLANKS, FAMILIES, Family, family_tokenizer

NASTY = [
    "{{ bos_token }}",
    "{% raw %}",
    "{#",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\u2003",
    "---",
    "e\u0301",
    "\0",
]

every_family = pytest.mark.parametrize("name", FAMILIES)
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Reading:
    """A family with its tokenizer, and what the tests need to check encodings."""

    family: Family
    tokenizer: Any
    template: ChatTemplate
    encoder: Encoder
    plain: PlainTokenizer

    def rendered(self, messages: list[tuple[str, str]], for_generation: bool = True) -> str:
        chat = [{"role": role, "content": text} for role, text in messages]
        options = {"enable_thinking": False, "date_string": "26 Jul 2024"}
        return str(
            self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=for_generation, **options
            )
        )

    @cached_property
    def markers(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder
        return {id for id, token in added.items() if token.content not in BLANKS}

    @cached_property
    def ends(self) -> list[int]:
        """The tokens that end a turn, in their order."""
        ends = [self.family.end_of_turn, *self.family.further_ends]
        return [self.tokenizer.convert_tokens_to_ids(token) for token in ends]

    def ids_of(self, part: TextPart) -> list[int]:
        if part.is_markup:
            return encode_markup(part.text, self.tokenizer, self.plain)
        return self.plain.encode([part.text])[0]

    def decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def as_encoded(self, text: str) -> str:
        """Return a text after the normalization of the tokenizer."""
        if self.family.kind == "byte_level":
            return text
        return unicodedata.normalize("NFC", text) if self.family.kind == "nfc" else text.replace("▁", " ")


@cache
def reading(name: str) -> Reading:
    tokenizer = family_tokenizer(name)
    return Reading(
        FAMILIES[name], tokenizer, ChatTemplate(tokenizer), Encoder(tokenizer), PlainTokenizer(tokenizer)
    )


def texts(family: Family) -> st.SearchStrategy[str]:
    """Arbitrary Unicode mixed with the family's control tokens, template syntax, new lines and spaces."""
    piece = st.one_of(
        st.sampled_from(family.controls),
        st.sampled_from(NASTY),
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    )
    return st.lists(piece, min_size=1, max_size=5).map("".join)


@st.composite
def chats(draw: st.DrawFn, name: str, shared: str = "") -> Sample:
    """A prompt that the family's template takes, and a response; `shared` is one of the documents."""
    family = FAMILIES[name]
    text = texts(family)
    not_blank = text.map(lambda t: t if t.strip() else f"{t}?")
    has_system = family.system != "never" and draw(st.booleans())
    num_turns = 1 if has_system and family.system == "single" else draw(st.integers(1, 3))
    roles = ["system"] * has_system + ["user", "assistant"] * (num_turns - 1) + ["user"]
    holder = draw(st.sampled_from([i for i, role in enumerate(roles) if role != "assistant"]))
    messages, documents, number = [], [], 0
    for i, role in enumerate(roles):
        if role == "assistant":
            answer = draw(not_blank)
            messages.append(Message(role=role, content=(answer.replace(family.loses or "\0", "."),)))
            number += 1
            continue
        found = draw(st.lists(text, max_size=2))
        if shared and i == holder:
            found.insert(draw(st.integers(0, len(found))), shared)
        lead, tail = draw(st.booleans()), i == len(roles) - 1 or not found or draw(st.booleans())
        # no document at the edge of a message has white space there, because a template may trim it
        if not lead and found and found[0] != found[0].lstrip():
            lead = True
        if found and found[-1] != found[-1].rstrip():
            tail = True
        content = [draw(not_blank)] * lead + found + [draw(not_blank)] * tail
        documents += range(number + lead, number + lead + len(found))
        number += len(content)
        messages.append(Message(role=role, content=tuple(content)))
    return Sample(
        id="s",
        source="s",
        messages=tuple(messages),
        response=draw(not_blank).replace(family.loses or "\0", "."),
        meta={"documents": documents},
    )


@every_family
def test_the_ids_of_a_block_depend_only_on_its_text_and_markup(name: str) -> None:
    r = reading(name)

    @few
    @given(chats(name))
    def holds(sample: Sample) -> None:
        rendered = r.template.render(sample.messages, sample.documents, sample.response)
        (example,) = r.encoder.encode([sample])
        blocks = [block.tolist() for block in example.blocks]
        assert [*chain.from_iterable(blocks)] == example.input_ids.tolist()
        assert (
            example.layout_in_mode("full").num_tokens
            == example.layout_in_mode("block").num_tokens
            == len(example)
        )
        expected = [[*chain.from_iterable(map(r.ids_of, block))] for block in rendered.blocks]
        assert r.encoder.encode_prompt(sample) == expected
        answer = r.ids_of(rendered.answer)
        assert blocks[:-1] == expected[:-1]
        assert blocks[-1][: len(expected[-1])] == expected[-1]
        labels = [label for label in example.labels.tolist() if label != IGNORE_INDEX]
        assert labels == blocks[-1][len(expected[-1]) :]
        assert (labels[: len(answer)], labels[-1]) == (answer, r.ends[-1])

    holds()


@every_family
def test_a_document_is_the_same_block_in_any_prompt(name: str) -> None:
    r = reading(name)

    @few
    @given(st.data(), texts(FAMILIES[name]))
    def holds(data: st.DataObject, document: str) -> None:
        block = (TextPart(document, is_markup=False),)
        found = []
        for sample in (data.draw(chats(name, document)), data.draw(chats(name, document))):
            rendered = r.template.render(sample.messages, sample.documents, sample.response)
            documents = [
                b for b in rendered.blocks if b[0].text in {sample.blocks[d] for d in sample.documents}
            ]
            assert documents.count(block) >= 1
            (example,) = r.encoder.encode([sample])
            found += [
                ids.tolist() for b, ids in zip(rendered.blocks, example.blocks, strict=True) if b == block
            ]
        assert all(ids == found[0] for ids in found)
        assert r.decoded(found[0]) == r.as_encoded(document)

    holds()


@every_family
def test_the_concatenated_blocks_equal_the_rendered_prompt(name: str) -> None:
    r = reading(name)

    @few
    @given(chats(name))
    def holds(sample: Sample) -> None:
        rendered = r.template.render(sample.messages, sample.documents, sample.response)
        parts = [*chain.from_iterable(rendered.blocks)]
        prompt = "".join(part.text for part in parts)
        messages = [(m.role, m.text) for m in sample.messages]
        assert prompt == r.rendered(messages)
        drops_system = r.family.system == "single" and messages[0][0] == "system"
        if not drops_system:
            chat = r.rendered([*messages, ("assistant", sample.response)], for_generation=False)
            assert f"{prompt}{rendered.opening}{rendered.response}{rendered.ending}" == chat
        assert rendered.opening == r.family.opening
        written = [part.text for part in parts if not part.is_markup]
        for number, (own, text) in enumerate(zip(sample.blocks, written, strict=True)):
            may_trim = r.family.trim and number not in sample.documents
            assert text in {own, *([own.strip(), own.lstrip(), own.rstrip()] if may_trim else [])}
        assert rendered.response in {
            sample.response,
            sample.response.strip(),
            sample.response.lstrip("\n"),
        }

    holds()


@every_family
def test_markup_never_becomes_part_of_a_document_block(name: str) -> None:
    r = reading(name)

    @few
    @given(chats(name))
    def holds(sample: Sample) -> None:
        blocks = r.template.render(sample.messages, sample.documents, sample.response).blocks
        documents = [sample.blocks[number] for number in sample.documents]
        alone = [block[0].text for block in blocks[:-1] if len(block) == 1 and not block[0].is_markup]
        rest = iter(alone)
        assert all(document in rest for document in documents)
        # markup is a block of its own only at the start and after a document
        for before, block in zip((None, *blocks[:-1]), blocks, strict=True):
            if block[0].is_markup and len(blocks) > 1:
                assert before is None or len(before) == 1 and before[0].text in documents

    holds()


@every_family
def test_joined_leading_markup_changes_the_first_block_and_no_token_id(name: str) -> None:
    r = reading(name)
    joining = Encoder(r.tokenizer, local_sees_first=True)

    @few
    @given(chats(name))
    def holds(sample: Sample) -> None:
        (example,), (joined,) = r.encoder.encode([sample]), joining.encode([sample])
        assert joined.input_ids.tolist() == example.input_ids.tolist()
        assert joined.label_spans == example.label_spans
        rendered = r.template.render(sample.messages, sample.documents, sample.response)
        first, *rest = example.block_lengths
        if joined.block_lengths != example.block_lengths:
            assert joined.block_lengths == (first + rest[0], *rest[1:]) and len(rest) > 1
            assert all(part.is_markup for part in rendered.blocks[0])
            text = rendered.blocks[1][0].text
            assert text not in {sample.blocks[number] for number in sample.documents if number == 0}
        ids = [[*map(int, block)] for block in joining.encode_prompt(sample)]
        assert ids[:-1] == [block.tolist() for block in joined.blocks[:-1]]

    holds()


@every_family
def test_text_from_data_never_becomes_an_added_token(name: str) -> None:
    r = reading(name)

    @few
    @given(chats(name))
    def holds(sample: Sample) -> None:
        rendered = r.template.render(sample.messages, sample.documents, sample.response)
        (example,) = r.encoder.encode([sample])
        markup = [part.text for part in chain.from_iterable(rendered.blocks) if part.is_markup]
        meant = [id for text in markup for id in r.tokenizer(text, add_special_tokens=False)["input_ids"]]
        meant += r.ends
        assert [id for id in example.input_ids.tolist() if id in r.markers] == [
            id for id in meant if id in r.markers
        ]

    holds()


@every_family
def test_a_document_that_spells_control_tokens_is_text(name: str) -> None:
    r = reading(name)
    controls = r.family.controls
    for document in (*controls, "".join(controls), f" {'  '.join(controls)} "):
        messages = (Message(role="user", content=("Read.", document, "Who?")),)
        sample = Sample(id="s", source="s", messages=messages, response="!", meta={"documents": [1]})
        ids = r.encoder.encode_prompt(sample)[2]
        assert r.markers.isdisjoint(ids)
        assert r.decoded(ids) == r.as_encoded(document)


@every_family
def test_a_chat_has_the_control_tokens_of_the_rendered_template(name: str) -> None:
    r = reading(name)
    messages = (Message(role="user", content=("One. ", "Who?")),)
    rendered = r.rendered([("user", "One. Who?")])
    (example,) = r.encoder.encode([Sample(id="s", source="s", messages=messages, response="The fox")])
    known = [id for id in r.tokenizer(rendered, add_special_tokens=False)["input_ids"] if id in r.markers]
    assert [id for id in example.input_ids.tolist() if id in r.markers] == [*known, *r.ends]
    last = r.decoded(r.ends[-1:])
    ending, end, _ = r.template.render(messages, (), "The fox").ending.partition(last)
    labels = [label for label in example.labels.tolist() if label != IGNORE_INDEX]
    # the tokenizer of Phi 3 drops the white space after a control token, that of Phi 3.5 adds a space
    written = {"phi3": "", "phi35": " \n"}.get(name, "\n")
    assert r.decoded(labels) == f"{r.family.opening}The fox{ending}{end}".replace(">\n", f">{written}")


@every_family
def test_the_end_of_turn_is_that_of_the_family(name: str) -> None:
    r = reading(name)
    assert r.tokenizer.convert_ids_to_tokens(r.encoder.eos_token_id) == r.family.end_of_turn
    assert r.encoder.end_token_ids == {*r.ends}
