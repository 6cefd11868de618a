"""Keys of blocks, and sizes in bytes as users write them."""

import pytest

from blockft.errors import UserError
from blockft.inference.block_key import (
    block_key,
    context_keys,
    first_ids,
    key_digest,
    num_first,
    num_tokens,
    token_ids,
)
from blockft.units import format_bytes, parse_bytes


def test_a_key_contains_the_token_ids_of_its_block() -> None:
    ids = [0, 1, 255, 256, 151_643, 2**31 - 1]
    key = block_key(ids)
    assert token_ids(key) == ids and num_tokens(key) == len(ids)
    assert key == block_key(tuple(ids)) and key != block_key(ids[::-1])


def test_a_key_contains_the_first_block_that_its_block_sees() -> None:
    key = block_key([1, 2, 3], first=[4, 5])
    assert token_ids(key) == [1, 2, 3] and num_tokens(key) == 3
    assert first_ids(key) == [4, 5] and num_first(key) == 2
    assert first_ids(block_key([1])) == [] and num_first(block_key([1])) == 0


def test_limits_between_a_block_and_its_first_block_count() -> None:
    """The same tokens in another place are another key, with another digest."""
    keys = [block_key([1, 2, 3][start:], [1, 2, 3][:start]) for start in range(3)]
    keys += [block_key([2, 3, 1], []), block_key([1], [2, 3]), block_key([2, 3], [1, 1]), block_key([1], [1])]
    assert len({*keys}) == len({*map(key_digest, keys)}) == len(keys)


def test_blocks_but_the_first_see_the_first_if_the_model_was_trained_so() -> None:
    blocks = [[1, 2], [3], [1, 2]]
    assert context_keys(blocks) == [block_key(block) for block in blocks]
    seeing = context_keys(blocks, local_sees_first=True)
    assert seeing == [block_key([1, 2]), block_key([3], [1, 2]), block_key([1, 2], [1, 2])]
    assert context_keys([], local_sees_first=True) == []
    assert context_keys([[7]], local_sees_first=True) == [block_key([7])]


def test_digests_do_not_change_between_versions() -> None:
    """Entries in existing folders are found by their digest."""
    assert key_digest(block_key([1, 2, 3])) == "b30a3c159d7e8193559a42a84f1fcae1"
    assert key_digest(block_key([1, 2, 3], [4])) == "cd6ed8766ce519c0101fbcfb25a9d044"


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
