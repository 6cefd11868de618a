"""The counted pairs are those of the dense mask."""

import random
from dataclasses import replace

import numpy as np
import pytest

from blockft.attention.layout import Layout, build_metadata
from blockft.attention.mask import build_dense_mask
from blockft.attention.pairs import LayoutArrays, count_pairs
from tests.tiny import random_layout


def make_layouts() -> list[Layout]:
    """Return layouts of 1 to 9 blocks, of which 1 to all are final."""
    rng = random.Random(0)
    layouts = [Layout((1,)), Layout((5,)), Layout((1, 1)), Layout((3, 2), 2), Layout((2, 3, 4), 1)]
    for _ in range(60):
        num_blocks = rng.randint(1, 9)
        num_final = rng.choice([1, 1, rng.randint(1, num_blocks)])
        layouts.append(random_layout(rng, rng.randint(num_blocks + 1, 60), num_blocks, num_final))
    return layouts


def count_in_mask(layout: Layout, window: int | None, reencoded: bool = True) -> int:
    return int(build_dense_mask(build_metadata([layout], reencoded=reencoded), window).sum())


@pytest.mark.parametrize("reencoded", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 30, 1000])
def test_counted_pairs_are_those_of_the_dense_mask(window: int | None, reencoded: bool) -> None:
    layouts = make_layouts()
    block, full = count_pairs(LayoutArrays.of(layouts), window, reencoded=reencoded)
    assert block.tolist() == [count_in_mask(layout, window, reencoded) for layout in layouts]
    assert full.tolist() == [count_in_mask(layout.full(), window, reencoded) for layout in layouts]


@pytest.mark.parametrize("window", [None, 1, 2, 7, 30, 1000])
def test_pairs_of_copies_are_counted(window: int | None) -> None:
    layouts = make_layouts()
    arrays = LayoutArrays.of(layouts)
    block, full = count_pairs(arrays, window, local_sees_first=True)
    with_copies = [replace(layout, local_sees_first=True) for layout in layouts]
    assert block.tolist() == [count_in_mask(layout, window) for layout in with_copies]
    assert full.tolist() == count_pairs(arrays, window)[1].tolist()
    num_copied = [layout.num_row_tokens - layout.num_tokens for layout in with_copies]
    assert arrays.copy_lens.tolist() == num_copied and any(num_copied)


def test_no_layouts_and_very_long_ones_are_counted() -> None:
    block, full = count_pairs(LayoutArrays.of([]))
    assert len(block) == len(full) == 0
    length = 1_000_000
    layouts = LayoutArrays.of([Layout((length, length, 1)), Layout((2 * length + 1,))])
    block, full = count_pairs(layouts)
    triangle = length * (length + 1) // 2
    assert block[0] == 2 * triangle + 2 * length + 1
    assert full[0] == full[1] == block[1] == (2 * length + 1) * (length + 1)
    assert block.dtype == np.int64
