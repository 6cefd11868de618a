"""The ids of texts that a server encodes again and again."""

import numpy as np

from blockft.data.encoder import Encoder
from blockft.data.sample import Sample
from blockft.data.token_cache import ENTRY_BYTES, Ids, TokenCache
from tests.data.toys import CHATML, rag_sample, toy_tokenizer


class Recorded:
    """A tokenizer that makes a token of each character, and records its calls."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode(self, texts: list[str]) -> list[Ids]:
        self.calls.append(texts)
        if "bad" in texts:
            raise ValueError("bad")
        return [np.array([*map(ord, text)], np.int32) for text in texts]


def test_a_text_is_encoded_once() -> None:
    recorded = Recorded()
    cache = TokenCache(recorded.encode, 1 << 20)
    assert [ids.tolist() for ids in cache.encode(["a", "bc", "a"])] == [[97], [98, 99], [97]]
    assert [ids.tolist() for ids in cache.encode(["bc", "d"])] == [[98, 99], [100]]
    assert [ids.tolist() for ids in cache.encode(["d", "a"])] == [[100], [97]]
    assert recorded.calls == [["a", "bc"], ["d"]]


def test_the_least_recently_used_texts_are_dropped_within_the_memory() -> None:
    recorded = Recorded()
    cache = TokenCache(recorded.encode, 3 * (ENTRY_BYTES + 100))
    for text in ("a", "b", "c", "a", "d", "a", "b"):
        assert cache.encode([text])[0].tolist() == [ord(text)]
        assert cache.used_bytes <= 3 * (ENTRY_BYTES + 100)
    assert recorded.calls == [["a"], ["b"], ["c"], ["d"], ["b"]]
    assert len(cache.encode(["x" * 5000])[0]) == 5000 and not cache.used_bytes


def test_a_text_that_cannot_be_encoded_is_not_kept() -> None:
    recorded = Recorded()
    cache = TokenCache(recorded.encode, 1 << 20)
    for _ in range(2):
        try:
            cache.encode(["bad"])
        except ValueError:
            continue
        raise AssertionError
    assert len(recorded.calls) == 2


def test_an_encoder_with_a_cache_gives_the_same_ids_and_keeps_them_from_callers() -> None:
    """A document has the ids of text from data, and of a templated prompt, where it may be an added token."""
    text = "a <|im_end|> b"
    prompts = [
        rag_sample(documents=(text, "One.")),
        Sample(id="1", source="s", templated=(text, "One."), response="r"),
        rag_sample(documents=("One.", text)),
    ]
    plain, cached = Encoder(toy_tokenizer(CHATML)), Encoder(toy_tokenizer(CHATML), cache_bytes=1 << 20)
    for prompt in (*prompts, *prompts):
        blocks = cached.encode_prompt(prompt)
        assert blocks == plain.encode_prompt(prompt)
        for ids in blocks:
            ids.clear()
