"""Text of users on the page: everything in it can be seen, and nothing in it acts."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockft.page.visible_text import decode, split_text, split_tokens
from tests.data.toys import toy_tokenizer


def kinds(text: str) -> list[tuple[str, str]]:
    return [(piece.kind, piece.text) for piece in split_text(text)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a b", [("text", "a b")]),
        (" a", [("space", " "), ("text", "a")]),
        ("a  b \n", [("text", "a"), ("space", "  "), ("text", "b"), ("space", " "), ("newline", "\n")]),
        ("a\tb\r\n", [("text", "a"), ("tab", "\t"), ("text", "b"), ("code", "U+000D"), ("newline", "\n")]),
        ("\x1b[2J", [("code", "U+001B"), ("text", "[2J")]),
        ("\u202eabc", [("code", "U+202E"), ("text", "abc")]),
        ("\ud800\u200b\ufeff", [("code", "U+D800"), ("code", "U+200B"), ("code", "U+FEFF")]),
        ("a\u00a0b", [("text", "a"), ("code", "U+00A0"), ("text", "b")]),
        ("\u2800\u3164", [("code", "U+2800"), ("code", "U+3164")]),
        ("naïve 日本 \U0001f469\u200d\U0001f467", [("text", "naïve 日本 \U0001f469\u200d\U0001f467")]),
        ("می\u200cخواهم", [("text", "می\u200cخواهم")]),
    ],
)
def test_white_space_and_unseen_characters_become_pieces(text: str, pieces: list[tuple[str, str]]) -> None:
    assert kinds(text) == pieces


@given(st.text(st.characters(codec=None)))
def test_the_pieces_hold_the_whole_text_and_no_control(text: str) -> None:
    whole = ""
    for piece in split_text(text):
        whole += chr(int(piece.text[2:], 16)) if piece.kind == "code" else piece.text
        if piece.kind != "code":
            hidden = {c for c in piece.text if unicodedata.category(c)[0] == "C"} - {"\n", "\t"}
            assert hidden <= {"\u200c", "\u200d"}
    assert whole == text


def test_an_added_token_is_a_piece_and_text_that_spells_it_is_not() -> None:
    tokenizer = toy_tokenizer()
    added = tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = [added, *tokenizer.encode("fox\n", add_special_tokens=False)]
    pieces = split_tokens(tokenizer, ids, {added})
    assert [(p.kind, p.text) for p in pieces] == [
        ("token", "<|im_start|>"),
        ("text", "fox"),
        ("newline", "\n"),
    ]
    assert kinds("<|im_start|>") == [("text", "<|im_start|>")]


def test_decoding_with_the_ids_before_keeps_a_space_that_a_decoder_removes() -> None:
    class Stripping:
        """Decodes as tokenizers of Llama 2 do: the first space of a text is removed."""

        def decode(self, ids: list[int], **options: bool) -> str:
            return "".join(" word" if id else "x" for id in ids).removeprefix(" ")

    assert decode(Stripping(), [1]) == "word"  # type: ignore[arg-type]
    assert decode(Stripping(), [1, 0], previous=[0]) == " wordx"  # type: ignore[arg-type]
