"""The pieces of a stream are the tokenizer's decoded text up to the first stop string."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from blockft.errors import UserError
from blockft.inference.text_stream import TextStream
from tests.data.families import FAMILIES, family_tokenizer
from tests.data.toys import toy_tokenizer

DEMO = Path(__file__).parents[2] / "data/demo/model"
TEXTS = ["\U0001f98a", "é\n", "  a", " ", " .", "\ufffd", "The fox", " <|im_end|>", "<0x0A>"]


def stripping(num_spaces: int) -> Any:
    """Return the decoder of Llama 2's tokenizer, which strips spaces at the start."""
    rules = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*rules, decoders.Strip(" ", num_spaces, 0)])


def with_decoder(name: str, decoder: Any) -> PreTrainedTokenizerFast:
    tokenizer = deepcopy(family_tokenizer(name))
    tokenizer.backend_tokenizer.decoder = decoder
    return tokenizer


TOKENIZERS = {
    "toy": toy_tokenizer,
    "demo": lambda: AutoTokenizer.from_pretrained(DEMO),
    "stripping": lambda: with_decoder("llama2", stripping(1)),
    "stripping-two": lambda: with_decoder("gemma2", stripping(2)),
    "metaspace-decoder": lambda: with_decoder("mistral_v3", decoders.Metaspace()),
    "no-decoder": lambda: with_decoder("phi35", None),
    **{name: lambda name=name: family_tokenizer(name) for name in FAMILIES},
}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return TOKENIZERS[name]()  # type: ignore[no-any-return]


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def until_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the first stop string, and whether there is one. Checks every character."""
    for end in range(1, len(text) + 1):
        if matches := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, matches))], True
    return text, False


def ids_of(tokenizer: PreTrainedTokenizerFast, *texts: str) -> list[int]:
    return [
        id for text in texts for id in tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    ]


def byte_ids(tokenizer: PreTrainedTokenizerFast, text: bytes) -> list[int]:
    return tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text])  # type: ignore[return-value]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_the_pieces_are_the_decoded_text_up_to_the_first_stop_string(name: str, data: Any) -> None:
    tokenizer = tokenizer_of(name)
    texts = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    # also ids that the tokenizer does not have, and byte tokens in any order
    some_ids = st.lists(st.integers(0, len(tokenizer) + 3), max_size=6)
    ids = sum(data.draw(st.lists(some_ids | texts.map(lambda text: ids_of(tokenizer, text)))), [])
    text = decoded(tokenizer, ids)
    parts = st.tuples(st.integers(0, len(text)), st.integers(1, 4)).map(lambda p: text[p[0] : sum(p)])
    stops = [stop for stop in data.draw(st.lists(parts | texts, max_size=3)) if stop]
    stream = TextStream(tokenizer, stops)
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) == stream.text
    pieces.append(stream.close())
    assert ("".join(pieces), stream.stopped) == until_stop(text, stops)
    assert stream.text == "".join(pieces) and stream.close() == ""


@pytest.mark.parametrize("name", ["toy", "stripping", "metaspace-decoder", "gemma3", "phi35"])
def test_text_that_cannot_change_is_not_held_back(name: str) -> None:
    tokenizer = tokenizer_of(name)
    stream, ids = TextStream(tokenizer, ["?\n"]), ids_of(tokenizer, "The quick brown fox. Who? The dog")
    for i, id in enumerate(ids, start=1):
        stream.push(id)
        assert stream.text == decoded(tokenizer, ids[:i]).removesuffix("?")


def test_a_character_of_several_tokens_is_one_piece() -> None:
    tokenizer = tokenizer_of("toy")
    ids = ids_of(tokenizer, "\U0001f98a!")
    assert len(ids) == 5
    stream = TextStream(tokenizer)
    assert [stream.push(id) for id in ids] == ["", "", "", "\U0001f98a", "!"]


def test_an_invalid_byte_makes_its_whole_run_of_byte_tokens_invalid() -> None:
    tokenizer = tokenizer_of("stripping")
    good, bad = byte_ids(tokenizer, "é".encode()), byte_ids(tokenizer, b"\xff")
    letter: Any = tokenizer.convert_tokens_to_ids("a")
    stream = TextStream(tokenizer)
    assert [stream.push(id) for id in (*good, letter)] == ["", "", "éa"]
    assert [stream.push(id) for id in (*good, *bad, letter)] == ["", "", "", "\ufffd" * 3 + "a"]


def test_a_special_token_does_not_end_a_run_of_byte_tokens() -> None:
    tokenizer = tokenizer_of("stripping")
    first, second = byte_ids(tokenizer, "é".encode())
    stream = TextStream(tokenizer)
    assert [stream.push(id) for id in (first, tokenizer.eos_token_id, second)] == ["", "", ""]
    assert stream.close() == "é"


def test_spaces_are_not_cleaned_up() -> None:
    tokenizer = deepcopy(family_tokenizer("phi35"))
    tokenizer.clean_up_tokenization_spaces = True
    stream = TextStream(tokenizer)
    pieces = [stream.push(id) for id in ids_of(tokenizer, "fox , he 's")]
    assert "".join(pieces).strip() == "fox , he 's"


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["\n\n", "."], "A fox. It\n\nB", "A fox"),
        (["bc", "abcd"], "abcd", "a"),
        (["c", "bc"], "abcd", "a"),
        (["W", " Who"], "a Who", "a "),
        (["aab"], "aaab", "a"),
    ],
)
def test_the_stop_string_that_ends_first_counts(stops: list[str], text: str, expected: str) -> None:
    tokenizer = tokenizer_of("toy")
    stream = TextStream(tokenizer, stops)
    ids = ids_of(tokenizer, text)
    pieces = [stream.push(id) for id in ids]
    assert ("".join(pieces), stream.text, stream.stopped) == (expected, expected, True)
    assert (stream.push(ids[0]), stream.close(), stream.text) == ("", "", expected)


def test_the_start_of_a_stop_string_is_text_if_no_token_follows() -> None:
    tokenizer = tokenizer_of("toy")
    stream = TextStream(tokenizer, ["END"])
    pieces = [stream.push(id) for id in ids_of(tokenizer, "An EN")]
    assert "".join(pieces) == "An "
    assert (stream.close(), stream.stopped, stream.text) == ("EN", False, "An EN")


def test_a_stop_string_can_be_found_when_the_stream_closes() -> None:
    tokenizer = tokenizer_of("stripping")
    stream = TextStream(tokenizer, ["\n"])
    text = "".join(stream.push(id) for id in [*ids_of(tokenizer, "a"), *byte_ids(tokenizer, b"\n")])
    assert not stream.stopped
    assert (text.strip(), stream.close(), stream.stopped) == ("a", "", True)


@pytest.mark.parametrize("stop", ["END", ["END", ""]])
def test_invalid_stop_strings_are_refused(stop: Any) -> None:
    with pytest.raises(UserError, match="a list of non-empty texts"):
        TextStream(tokenizer_of("toy"), stop)
