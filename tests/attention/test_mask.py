"""Masks follow the rule of Block-Attention: as drawn, by brute force, in tiles, and with windows."""

import random
from dataclasses import replace

import pytest
import torch

from blockft.attention.layout import PADDING, AttentionMetadata, Layout, build_metadata, token_indices
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


def test_a_local_block_sees_a_copy_of_the_first_block() -> None:
    expected = parse_picture("""
        # . . . . . . .
        . # . . . . . .
        . # # . . . . .
        . . . # . . . .
        . . . # # . . .
        . . . # # # . .
        # . # . # # # .
        # . # . # # # #
    """)
    assert torch.equal(example_mask((1, 1, 2, 2), local_sees_first=True), expected)


def test_a_copy_ends_at_the_position_before_its_block() -> None:
    layout = Layout((2, 1, 2, 2, 1), 2, local_sees_first=True)
    metadata = build_metadata([layout, Layout((3, 4))], 22)
    assert (layout.num_tokens, layout.num_first_copies, layout.num_row_tokens) == (8, 2, 12)
    first = [0, 1, 0, 1, 2, 1, 2, 3, 4, 5, 6, 5]
    assert metadata.position_ids.tolist() == [[*first, *range(7), 0, 1, 2]]
    assert metadata.block_ids.tolist() == [
        [0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4, *[5] * 3, *[6] * 4, *[-1] * 3]
    ]
    assert metadata.is_copy.nonzero()[:, 1].tolist() == [2, 3, 5, 6]
    assert token_indices([layout, Layout((3, 4))]).tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, *range(5, 15)]


@pytest.mark.parametrize("lengths", [(5,), (2, 3), (2, 3, 1, 1)])
def test_prompts_of_at_most_one_local_block_have_no_copies(lengths: tuple[int, ...]) -> None:
    num_final = max(1, len(lengths) - 1)
    layout, plain = Layout(lengths, num_final, local_sees_first=True), Layout(lengths, num_final)
    for found, expected in (
        (layout, plain),
        (layout.full(), plain.full()),
        (replace(plain.full(), local_sees_first=True), plain.full()),
    ):
        assert found.num_row_tokens == expected.num_tokens
        for ids, wanted in zip(
            build_metadata([found]).as_tuple(), build_metadata([expected]).as_tuple(), strict=True
        ):
            assert torch.equal(ids, wanted)


def test_the_full_mode_of_blocks_that_see_the_first_has_no_copies() -> None:
    assert Layout((2, 3, 2, 1), 2, local_sees_first=True).full() == Layout((5, 2, 1), 2)


def test_copies_without_reencoded_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="re-encoded"):
        build_metadata([Layout((2, 3, 2), local_sees_first=True)], reencoded=False)
    build_metadata([Layout((2, 3), local_sees_first=True)], reencoded=False)


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
        num_final = rng.randint(1, num_blocks)
        sees_first = bool(seed % 2)
        layouts.append(
            random_layout(rng, rng.randint(5, 15), num_blocks, num_final, local_sees_first=sees_first)
        )
    row_len = sum(layout.num_row_tokens for layout in layouts) + 4
    metadata = build_metadata(layouts, row_len)
    mask = build_dense_mask(metadata)[0, 0]
    _, example, block, final, copy = (ids[0].tolist() for ids in metadata.as_tuple())
    for q in range(row_len):
        for k in range(row_len):
            is_read = block[q] == block[k] or final[q] and not final[k] and not copy[k]
            assert mask[q, k] == (k <= q and example[q] == example[k] and is_read)
            assert mask[q, k] == may_attend(q, k, *(ids[0] for ids in metadata.as_tuple()[1:]))


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
        layouts, left, has_copies = [], row_len, rng.random() < 0.5
        while (length := rng.randint(1, 17)) <= left and rng.random() < 0.9:
            num_blocks = rng.randint(1, min(length, 6))
            num_final = rng.randint(1, num_blocks)
            layout = random_layout(rng, length, num_blocks, num_final, local_sees_first=has_copies)
            layout = rng.choice((layout, layout, layout.full()))
            if layout.num_row_tokens <= left:
                layouts.append(layout)
                left -= layout.num_row_tokens
        rows.append(build_metadata(layouts, row_len, reencoded=has_copies or rng.random() < 0.8))
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
