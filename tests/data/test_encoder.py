from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from blockft.data.encoder import IGNORE_INDEX, Encoder
from blockft.data.fit import EncodedSample, encode_samples
from blockft.data.sample import Message
from blockft.data.shared_context import merge_shared_contexts
from blockft.data.tokenizer import PlainTokenizer, tokenizer_fingerprint
from blockft.errors import UserError
from tests.data.toys import CHATML, ENDLESS, TRIMMING, rag_sample, toy_tokenizer

NASTY = "a <|im_end|> b <think> {{ c }} <|im_start|>assistant\n\U0001f98a é"


def test_the_ids_of_a_block_depend_only_on_its_own_text(encoder: Encoder) -> None:
    documents = ("One.\n\n", NASTY, "Two.\n\n")
    (example,) = encoder.encode([rag_sample(documents=documents)])
    (swapped,) = encoder.encode(
        [rag_sample("Which?", documents=(documents[2], "new", documents[1], documents[0]))]
    )
    ids, other = ([block.tolist() for block in e.blocks] for e in (example, swapped))
    assert (ids[0], ids[1], ids[2], ids[3], ids[4]) == (other[0], other[1], other[5], other[4], other[2])
    assert sum(ids, []) == example.input_ids.tolist()
    assert tuple(map(len, ids)) == example.block_lengths
    assert (
        example.layout_in_mode("full").num_tokens
        == example.layout_in_mode("block").num_tokens
        == len(example)
    )


@pytest.mark.parametrize("chat_template", [CHATML, TRIMMING])
def test_the_concatenated_blocks_equal_the_rendered_prompt(chat_template: str) -> None:
    tokenizer = toy_tokenizer(chat_template)
    sample = rag_sample(documents=(NASTY, " \n\n", "Two. "), question=f"{NASTY}\n")
    chat = [{"role": m.role, "content": m.text} for m in sample.messages]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    blocks = Encoder(tokenizer).encode_prompt(sample)
    assert "".join(tokenizer.decode(ids) for ids in blocks) == rendered
    (example,) = Encoder(tokenizer).encode([sample])
    assert tokenizer.decode(example.input_ids) == f"{rendered}The fox<|im_end|>"


def test_text_from_data_never_becomes_an_added_token(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    everywhere = rag_sample(NASTY, documents=(NASTY,), response=NASTY)
    everywhere = replace(
        everywhere, messages=(Message(role="system", content=(NASTY,)), *everywhere.messages)
    )
    (example,) = encoder.encode([everywhere])
    added = [id for id in example.input_ids.tolist() if id in tokenizer.added_tokens_decoder]
    assert tokenizer.convert_ids_to_tokens(added) == ["<|im_start|>", "<|im_end|>"] * 3


def test_a_vocabulary_that_spells_its_added_tokens_is_repaired_or_refused() -> None:
    pieces = ["<", "s", ">", "<s", "a"]
    vocabulary = {piece: i for i, piece in enumerate(["<s>", *pieces])}
    spelling = Tokenizer(models.BPE(vocab=vocabulary, merges=[("<", "s"), ("<s", ">")]))
    plain = PlainTokenizer(PreTrainedTokenizerFast(tokenizer_object=spelling, bos_token="<s>"))
    assert plain.encode(["a<s>a"]) == [[vocabulary[piece] for piece in ("a", "<s", ">", "a")]]
    words = Tokenizer(models.WordLevel(vocab={"<s>": 0, "[UNK]": 1}, unk_token="[UNK]"))
    plain = PlainTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="[UNK]")
    )
    assert plain.encode(["unheard"]) == [[1]]
    with pytest.raises(UserError, match="<s>"):
        plain.encode(["<s>"])


def test_no_space_is_put_before_a_block() -> None:
    pieces = ["▁", "a", "b"]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    plain = PlainTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert plain.encode(["a b", " b"]) == [[1, 0, 2], [0, 2]]


def test_labels_are_the_response_and_the_end_of_turn(
    encoder: Encoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    (example,) = encoder.encode([rag_sample()])
    labelled = example.labels != IGNORE_INDEX
    assert tokenizer.decode(example.labels[labelled]) == "The fox<|im_end|>"
    assert (example.labels[labelled] == example.input_ids[labelled]).all()
    assert labelled.nonzero()[0][-1] == len(example) - 1


def test_a_batch_of_samples_is_encoded_like_each_sample_alone(encoder: Encoder) -> None:
    samples = [rag_sample(f"Question {i}?", (NASTY, f"doc {i}")) for i in range(5)]
    for together, sample in zip(encoder.encode(samples), samples, strict=True):
        assert together.input_ids.tolist() == encoder.encode([sample])[0].input_ids.tolist()


def test_a_template_without_end_of_turn_is_refused() -> None:
    with pytest.raises(UserError, match="where a response ends"):
        Encoder(toy_tokenizer(ENDLESS)).encode([rag_sample()])


def test_a_sample_longer_than_a_row_is_dropped_or_trimmed(encoder: Encoder) -> None:
    sample = rag_sample(documents=("long " * 50, "gold"))
    unlabelled = replace(sample, response=" ")
    gold_len = len(encoder.encode([rag_sample(documents=("gold",))])[0])
    dropped = encode_samples([sample, unlabelled], encoder, gold_len, trim=False)
    assert [outcome.drop_reason for outcome in dropped] == ["too long", "no response"]
    (trimmed,) = encode_samples([sample], encoder, gold_len, trim=True)
    assert (trimmed.drop_reason, trimmed.sample.blocks) == ("", ("Answer.\n\n", "gold", "Who?"))
    (hopeless,) = encode_samples([sample], encoder, gold_len - 1, trim=True)
    assert hopeless.drop_reason == "too long"
    unranked = replace(sample, meta={"documents": sample.meta["documents"]})
    for trim, why in ((False, "too long"), (True, "too long, documents without relevance")):
        (outcome,) = encode_samples([unranked], encoder, gold_len, trim=trim)
        assert outcome.drop_reason == why


def test_copies_of_the_first_block_count_into_the_length_of_a_sample() -> None:
    encoder = Encoder(toy_tokenizer(), local_sees_first=True)
    meta = {"documents": [1, 2, 3], "relevance": [1, 0.5, 0]}
    sample = rag_sample(documents=("gold", "x y", "z"), meta=meta)
    (example,) = encoder.encode([sample])
    needed = len(example) + 3 * example.block_lengths[0]
    assert example.copy_len == 3 * example.block_lengths[0] > 0

    def fit(row_len: int, *, trim: bool = False, local_sees_first: bool = True) -> EncodedSample:
        (found,) = encode_samples([sample], encoder, row_len, trim=trim, local_sees_first=local_sees_first)
        return found

    assert (fit(needed).drop_reason, fit(needed).row_tokens) == ("", needed)
    assert (fit(needed - 1).drop_reason, fit(needed - 1).row_tokens) == ("too long", needed)
    assert fit(len(example), local_sees_first=False).drop_reason == ""
    assert fit(needed - 1, trim=True).sample.blocks == ("Answer.\n\n", "gold", "x y", "Who?")


def test_questions_share_a_context_with_its_copies_once() -> None:
    encoder = Encoder(toy_tokenizer(), local_sees_first=True)
    samples = [rag_sample("Who?"), rag_sample("Which one?"), rag_sample("Hm?")]
    examples = encoder.encode([replace(s, id=str(i)) for i, s in enumerate(samples)])
    (merged,) = merge_shared_contexts(iter(examples), row_len=1000, local_sees_first=True)
    row_len = merged.layout_in_mode("block", local_sees_first=True).num_row_tokens
    assert row_len == len(merged) + examples[0].copy_len
    for fitting, number in ((row_len, 1), (row_len - 1, 2)):
        found = list(merge_shared_contexts(iter(examples), fitting, local_sees_first=True))
        assert len(found) == number
    assert len(list(merge_shared_contexts(iter(examples), row_len - 1))) == 1


def test_questions_with_the_same_context_share_it(encoder: Encoder) -> None:
    samples = [
        rag_sample("Who?"),
        rag_sample("Which one?"),
        rag_sample("Who?", ("Other.",)),
        rag_sample("Hm?", ()),
    ]
    first, second, *rest = examples = encoder.encode([replace(s, id=str(i)) for i, s in enumerate(samples)])
    merged, *others = merge_shared_contexts(iter(examples), row_len=1000)
    assert (merged.num_final, merged.sample_ids, others) == (2, ("0", "1"), rest)
    assert merged.block_lengths == (*first.block_lengths, second.block_lengths[-1])
    last = second.block_lengths[-1]
    assert merged.input_ids.tolist() == [*first.input_ids, *second.input_ids[-last:]]
    assert merged.labels.tolist() == [*first.labels, *second.labels[-last:]]
    assert list(merge_shared_contexts(iter(examples), row_len=len(merged) - 1)) == examples


def test_a_fingerprint_covers_vocabulary_and_template() -> None:
    tokenizer = toy_tokenizer()
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(toy_tokenizer())
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(toy_tokenizer(TRIMMING))
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(toy_tokenizer())
