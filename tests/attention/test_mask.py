"""Masks follow the rule of Block-Attention: as drawn, by brute force, in tiles, and with windows."""

import random

import pytest
import torch

from blockft.attention.layout import PADDING, AttentionMetadata, Layout, build_metadata
from blockft.attention.mask import (
    KeyRanges,
    build_dense_mask,
    build_range_mask_mod,
    example_mask,
    may_attend,
    tile_occupancy,
)
from tests.tiny import random_layout


def parse_picture(picture: str) -> torch.Tensor:
    return torch.tensor([[mark == "#" for mark in line.split()] for line in picture.strip().splitlines()])


def test_masks_look_as_drawn_in_the_documentation() -> None:
    expected = parse_picture("""
        # . . . . .
        # # . . . .
        . . # . . .
        . . # # . .
        # # # # # .
        # # # # # #
    """)
    assert torch.equal(example_mask((2, 2, 2)), expected)


def test_questions_that_share_a_context_do_not_attend_to_each_other() -> None:
    expected = parse_picture("""
        # . . . . .
        . # . . . .
        # # # . . .
        # # # # . .
        # # . . # .
        # # . . # #
    """)
    assert torch.equal(example_mask((1, 1, 2, 2), num_final=2), expected)
    assert build_metadata([Layout((1, 1, 2, 2), 2)]).position_ids.tolist() == [[0, 1, 2, 3, 2, 3]]


def test_without_reencoding_local_blocks_keep_positions_from_0() -> None:
    layouts = [Layout((2, 3, 2)), Layout((2, 1, 2, 1), 2), Layout((3,))]
    metadata, reencoded = build_metadata(layouts, 18, reencoded=False), build_metadata(layouts, 18)
    first, second, third = [0, 1, 0, 1, 2, 5, 6], [0, 1, 0, 3, 4, 3], [0, 1, 2]
    assert metadata.position_ids.tolist() == [[*first, *second, *third, 0, 1]]
    for name in ("example_ids", "block_ids", "is_final"):
        assert torch.equal(getattr(metadata, name), getattr(reencoded, name))


def test_windows_compare_positions_not_row_indices() -> None:
    mask = example_mask((2, 1, 2), num_final=2, window=2)
    # the second question has row index 3 but position 2, one after the last token of the context
    assert mask[3].tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("num_tokens", [1, 7, 31])
def test_one_block_is_causal(num_tokens: int) -> None:
    assert torch.equal(
        example_mask((num_tokens,)), torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    )


@pytest.mark.parametrize("seed", range(20))
def test_masks_of_random_rows_match_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    layouts = []
    for _ in range(3):
        num_blocks = rng.randint(1, 5)
        layouts.append(random_layout(rng, rng.randint(5, 15), num_blocks, rng.randint(1, num_blocks)))
    metadata = build_metadata(layouts, row_len=50)
    mask = build_dense_mask(metadata)[0, 0]
    example, block, final = (
        v[0].tolist() for v in (metadata.example_ids, metadata.block_ids, metadata.is_final)
    )
    for q in range(50):
        for k in range(50):
            allowed = k <= q and example[q] == example[k] and (block[q] == block[k] or final[q] > final[k])
            assert mask[q, k] == allowed
            assert mask[q, k] == may_attend(
                q, k, metadata.example_ids[0], metadata.block_ids[0], metadata.is_final[0]
            )


def test_full_mode_is_causal_for_each_of_several_questions() -> None:
    layout = Layout((2, 3, 2, 1), num_final=2).full()
    assert layout == Layout((5, 2, 1), num_final=2)
    assert torch.equal(example_mask((5, 2)), example_mask((7,)))
    assert Layout((2, 3, 2)).full() == Layout((7,))


def test_padding_is_an_example_of_its_own() -> None:
    metadata = build_metadata([Layout((2, 2))], row_len=6)
    assert metadata.example_ids.tolist() == [[0, 0, 0, 0, PADDING, PADDING]]
    mask = build_dense_mask(metadata)[0, 0]
    assert not mask[4:, :4].any() and not mask[:4, 4:].any()
    assert mask.any(dim=1).all(), "a token that attends to no key gives NaN"


@pytest.mark.parametrize(("lengths", "num_final"), [((), 1), ((2, 0), 1), ((2, 2), 0), ((2, 2), 3)])
def test_impossible_layouts_are_refused(lengths: tuple[int, ...], num_final: int) -> None:
    with pytest.raises(ValueError):
        Layout(lengths, num_final)


def test_examples_longer_than_the_row_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        build_metadata([Layout((3,)), Layout((3,))], row_len=5)


def random_rows(rng: random.Random, num_rows: int, row_len: int) -> AttentionMetadata:
    """Return rows of random examples: one question or several, in block mode or full mode, with padding."""
    rows = []
    for _ in range(num_rows):
        layouts, left = [], row_len
        while (length := rng.randint(1, 17)) <= left and rng.random() < 0.9:
            num_blocks = rng.randint(1, min(length, 6))
            layout = random_layout(rng, length, num_blocks, rng.randint(1, num_blocks))
            layouts.append(rng.choice((layout, layout.full())))
            left -= length
        rows.append(build_metadata(layouts, row_len, reencoded=rng.random() < 0.8))
    ids = zip(*(row.as_tuple() for row in rows), strict=True)
    return AttentionMetadata(*(torch.cat(parts) for parts in ids))


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("seed", range(30))
def test_ranges_of_keys_give_the_mask_of_the_rule(seed: int, window: int | None) -> None:
    rng = random.Random(seed)
    row_len, tile = rng.randint(1, 90), rng.choice((1, 2, 4, 8, 128))
    metadata = random_rows(rng, 3, row_len)
    dense = build_dense_mask(metadata, window)[:, 0]
    mask_mod = build_range_mask_mod(KeyRanges.of_metadata(metadata), metadata, window)
    b, q, k = torch.arange(3)[:, None, None], torch.arange(row_len)[:, None], torch.arange(row_len)
    assert torch.equal(mask_mod(b, 0, q, k), dense)
    num_tiles, missing = -(-row_len // tile), -row_len % tile
    padded = torch.nn.functional.pad(dense, (0, missing, 0, missing))
    tiles = padded.reshape(3, num_tiles, tile, num_tiles, tile)
    any_allowed, all_allowed = tile_occupancy(metadata, window, tile, strip=128)
    assert torch.equal(any_allowed, tiles.any(dim=4).any(dim=2))
    assert torch.equal(all_allowed, tiles.all(dim=4).all(dim=2))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("row_len", [64, 61])
def test_tile_occupancy_summarises_the_mask(window: int | None, row_len: int) -> None:
    """Several strips and one strip give the same tiles, also for rows whose last tile is not full."""
    rng = random.Random(row_len)
    metadata = build_metadata(
        [random_layout(rng, 20, 3), Layout((9,)), random_layout(rng, 25, 4, 2)], row_len
    )
    dense = build_dense_mask(metadata, window)[:, 0]
    missing = -row_len % 4
    padded = torch.nn.functional.pad(dense, (0, missing, 0, missing)).reshape(1, 16, 4, 16, 4)
    expected = padded.any(dim=4).any(dim=2), padded.all(dim=4).all(dim=2)
    assert expected[0].any() and expected[1].any() and not expected[0].all()
    for strip in (8, 64):
        for found, wanted in zip(tile_occupancy(metadata, window, 4, strip=strip), expected, strict=True):
            assert torch.equal(found, wanted)
