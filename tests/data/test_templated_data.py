"""Prompts that arrive already templated: their markers are meant, and no chat template is needed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from blockft.data.chat_template import TemplateMismatch
from blockft.data.encoder import IGNORE_INDEX, Encoder
from blockft.data.fit import encode_samples
from blockft.data.sample import Sample
from blockft.data.tokenizer import TemplatedTokenizer
from blockft.errors import UserError
from tests.data.toys import rag_sample, toy_tokenizer

START, END = "<|im_start|>", "<|im_end|>"
BLOCKS = (f"{START}system\nSome notes.\n", "One. <think>é\U0001f98a\n", f"{END}\n{START}user\nWho?")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(BLOCKS)


def templated(*blocks: str, response: str = "The fox") -> Sample:
    return Sample(id="s", source="toy", templated=blocks, response=response)


def response_of(encoder: Encoder, tokenizer: PreTrainedTokenizerFast, response: str) -> str:
    (example,) = encoder.encode([templated(*BLOCKS, response=response)])
    return str(tokenizer.decode(example.labels[example.labels != IGNORE_INDEX]))


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_templated_blocks_are_encoded_one_by_one(encoder: Encoder, blocks: list[str]) -> None:
    tokenizer = toy_tokenizer()
    ids = encoder.encode_prompt(templated(*blocks))
    assert [tokenizer.decode(block) for block in ids] == blocks
    assert ids == [encoder.encode_prompt(templated(block))[0] for block in blocks]
    (example,) = encoder.encode([templated(*blocks)])
    assert example.input_ids.tolist()[: sum(map(len, ids))] == sum(ids, [])
    assert example.block_lengths[:-1] == tuple(map(len, ids[:-1]))


def test_control_tokens_in_templated_blocks_are_added_tokens(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = sum(encoder.encode_prompt(templated(*BLOCKS)), [])
    added = [id for id in ids if id in tokenizer.added_tokens_decoder]
    assert tokenizer.convert_ids_to_tokens(added) == [START, "<think>", END, START]


def test_a_templated_response_ends_once(encoder: Encoder, tokenizer: PreTrainedTokenizerFast) -> None:
    assert response_of(encoder, tokenizer, "The fox") == f"The fox{END}"
    assert response_of(encoder, tokenizer, f"The fox{END}") == f"The fox{END}"
    # <think> is an added token, but no special one: it ends nothing
    assert response_of(encoder, tokenizer, "The <think>") == f"The <think>{END}"


def test_templated_samples_need_no_chat_template() -> None:
    tokenizer = toy_tokenizer(None)
    encoder = Encoder(tokenizer)
    assert response_of(encoder, tokenizer, "The fox") == f"The fox{END}"
    assert encoder.eos_token_id == tokenizer.eos_token_id
    with pytest.raises(UserError, match="no chat template"):
        encoder.encode([rag_sample()])
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a chat template nor an eos token"):
        Encoder(tokenizer).encode([templated(*BLOCKS)])


def test_nothing_is_added_to_a_templated_block() -> None:
    backend = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "<s>": 2}, merges=[]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", add_bos_token=True)
    assert TemplatedTokenizer(tokenizer).encode(["a<s>a", " a"]) == [[1, 2, 1], [0, 1]]


def test_chats_and_templated_samples_keep_their_order(encoder: Encoder) -> None:
    samples = [templated(*BLOCKS), rag_sample(id="a"), replace(templated("x"), id="t"), rag_sample(id="b")]
    assert [e.sample_ids[0] for e in encoder.encode(samples)] == ["s", "a", "t", "b"]


class Choosy(Encoder):
    """Its template changes what holds an x."""

    def _render(self, sample, response):  # type: ignore[no-untyped-def]
        if "x" in sample.messages[-1].text:
            raise TemplateMismatch(f"sample {sample.id}: the template changes it")
        return super()._render(sample, response)


def test_a_mismatch_does_not_affect_the_other_samples_of_a_batch() -> None:
    encoder = Choosy(toy_tokenizer())
    samples = [rag_sample(id="a"), rag_sample("x?", id="b"), templated(*BLOCKS), rag_sample(id="c")]
    with pytest.raises(TemplateMismatch, match="^sample b of "):
        encode_samples(samples, encoder, 1000, trim=False)
    outcomes = encode_samples(samples, encoder, 1000, trim=False, skip_bad=True)
    assert [o.drop_reason for o in outcomes] == ["", "unfit for the chat template", "", ""]
    assert [o.example is None for o in outcomes] == [False, True, False, False]
    assert [o.is_mismatch for o in outcomes] == [False, True, False, False]
    assert [o.sample for o in outcomes] == samples


def test_a_sample_that_cannot_be_split_is_a_mismatch_and_is_named(encoder: Encoder) -> None:
    def split(sample: Sample) -> Sample:
        if sample.id == "b":
            raise TemplateMismatch("the vocabulary spells a marker", "added token spelled by a text")
        return replace(sample, id=f"split {sample.id}")

    samples = [rag_sample(id="a"), rag_sample(id="b"), replace(rag_sample(id="b"), response="")]
    with pytest.raises(TemplateMismatch, match=r"^sample b of \w+: the vocabulary spells a marker \("):
        encode_samples(samples, encoder, 1000, trim=False, split=split)
    outcomes = encode_samples(samples, encoder, 1000, trim=False, skip_bad=True, split=split)
    assert [o.drop_reason for o in outcomes] == ["", "added token spelled by a text", "no response"]
    assert [o.is_mismatch for o in outcomes] == [False, True, False]
    assert outcomes[0].sample.id == "split a"
