"""Keys of blocks, and sizes in bytes as users write them."""

import pytest

from blockft.errors import UserError
from blockft.inference.block_key import block_key, key_digest, num_tokens, token_ids
from blockft.units import format_bytes, parse_bytes


def test_a_key_contains_the_token_ids_of_its_block() -> None:
    ids = [0, 1, 255, 256, 151_643, 2**31 - 1]
    key = block_key(ids)
    assert token_ids(key) == ids and num_tokens(key) == len(ids)
    assert key == block_key(tuple(ids)) and key != block_key(ids[::-1])


def test_digests_do_not_change_between_versions() -> None:
    """Entries in existing folders are found by their digest."""
    assert key_digest(block_key([1, 2, 3])) == "b30a3c159d7e8193559a42a84f1fcae1"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4096", 4096),
        ("0", 0),
        ("10GB", 10**10),
        ("10 gb", 10**10),
        ("10G", 10**10),
        ("512MiB", 512 * 2**20),
        ("1.5TiB", 3 * 2**39),
        ("2.5kB", 2500),
        (" 7b ", 7),
    ],
)
def test_sizes_with_units_are_parsed(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "ten", "1,5GB", "10XB", "10iB", "1e9", "٣GB", "inf"])
def test_other_texts_are_not_sizes(text: str) -> None:
    with pytest.raises(UserError, match="10GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_499, "999 kB"),
        (999_600, "1.0 MB"),
        (64e9, "64.0 GB"),
        (10**16, "10000 TB"),
    ],
)
def test_sizes_are_formatted_with_units(number: int, text: str) -> None:
    assert format_bytes(number) == text
