"""The block layout of an example, and the per-token metadata that masks are built from.

Shapes: B rows of a batch, T tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

PADDING = -1
"""Example id and block id of padding tokens. Padding is an example of its own."""


@dataclass(frozen=True)
class Layout:
    """The lengths of an example's blocks, in tokens: local blocks first, then one final block per question.

    ::

        block_lengths (3, 2 | 2, 2), num_final 2:   local 0 0 0 1 1   final 2 2   final 3 3
        position                                          0 1 2 3 4         5 6         5 6

    Each final block attends to all local blocks and to itself, and starts at the position after the context.
    With one final block this is Block-Attention (Ma et al. 2025, section 2.1). With a single block it is full
    attention.

    With `local_sees_first`, every local block also attends to the first block, as if it stood right after it.
    A row then holds a copy of the first block before every local block but the first. The copy ends at the
    position before the block. Copy and block are one block for the mask, but final blocks see no copy::

        block_lengths (2, 1, 2, 2):   local 0 0   copy 1 1 local 1   copy 2 2 local 2 2   final 3 3
        position                            0 1        0 1       2        1 2       3 4         5 6

    Raises:
        ValueError: a block has no tokens, or `num_final` is not between 1 and the number of blocks.
    """

    block_lengths: tuple[int, ...]
    num_final: int = 1
    local_sees_first: bool = False

    def __post_init__(self) -> None:
        if not self.block_lengths or min(self.block_lengths) < 1:
            raise ValueError(f"every block needs at least one token, found lengths {self.block_lengths}")
        if not 1 <= self.num_final <= len(self.block_lengths):
            raise ValueError(f"{self.num_final} of {len(self.block_lengths)} blocks cannot be final")

    @property
    def num_tokens(self) -> int:
        """The number of tokens without copies of the first block."""
        return sum(self.block_lengths)

    @property
    def num_row_tokens(self) -> int:
        """The number of tokens that the example takes in a row: its tokens and the copies."""
        return self.num_tokens + self.num_first_copies * self.block_lengths[0]

    @property
    def num_first_copies(self) -> int:
        """The number of copies of the first block."""
        return max(0, len(self.local_lengths) - 1) if self.local_sees_first else 0

    def has_copy(self, block: int) -> bool:
        """Return whether a copy of the first block stands before the block of this index."""
        return 0 < block <= self.num_first_copies

    @property
    def local_lengths(self) -> tuple[int, ...]:
        return self.block_lengths[: -self.num_final]

    @property
    def final_lengths(self) -> tuple[int, ...]:
        return self.block_lengths[-self.num_final :]

    @property
    def context_len(self) -> int:
        """The number of tokens in local blocks, which is the position where every final block starts."""
        return sum(self.local_lengths)

    def full(self) -> "Layout":
        """Return the layout of the same tokens in full mode, which has no copies.

        With one question it is a single block. With several, the context is one local block that each
        question continues.
        """
        if self.num_final == 1:
            return Layout((self.num_tokens,))
        context = (self.context_len,) if self.context_len else ()
        return Layout((*context, *self.final_lengths), self.num_final)


@dataclass(frozen=True)
class AttentionMetadata:
    """The per-token ids that attention needs, each a (B, T) tensor.

    position_ids  the re-encoded position: the token's index in its example, without other final blocks
    example_ids   the token's example within the row; `PADDING` for padding
    block_ids     the token's block within the row; a copy of the first block belongs to the block after it
    is_final      whether the token's block is a final block
    is_copy       whether the token belongs to a copy of the first block (see `Layout`)
    """

    position_ids: torch.Tensor
    example_ids: torch.Tensor
    block_ids: torch.Tensor
    is_final: torch.Tensor
    is_copy: torch.Tensor

    def to(self, device: torch.device | str) -> "AttentionMetadata":
        """Return the metadata on a device."""
        return AttentionMetadata(*(ids.to(device) for ids in self.as_tuple()))

    def concatenate(self, other: "AttentionMetadata") -> "AttentionMetadata":
        """Return the metadata of longer rows: the tokens of each row, then those of the row of `other`."""
        pairs = zip(self.as_tuple(), other.as_tuple(), strict=True)
        return AttentionMetadata(*(torch.cat(pair, dim=1) for pair in pairs))

    def as_tuple(self) -> tuple[torch.Tensor, ...]:
        """Return the five tensors in the order of the fields."""
        return self.position_ids, self.example_ids, self.block_ids, self.is_final, self.is_copy


def token_indices(layouts: Sequence[Layout]) -> torch.Tensor:
    """Return which token of its examples each token of a row holds, without padding: (num_row_tokens,).

    The tokens of the examples are counted one after the other. Copies repeat the indices of the first block::

        layout (2, 1, 2, 2) with local_sees_first:  0 1   0 1 2   0 1 3 4   5 6
    """
    num_tokens = sum(layout.num_tokens for layout in layouts)
    if not any(layout.num_first_copies for layout in layouts):
        return torch.arange(num_tokens)
    indices = []
    start = 0
    for layout in layouts:
        first = np.arange(start, start + layout.block_lengths[0])
        for index, length in enumerate(layout.block_lengths):
            if layout.has_copy(index):
                indices.append(first)
            indices.append(np.arange(start, start + length))
            start += length
    return torch.from_numpy(np.concatenate(indices))


def build_metadata(
    layouts: Sequence[Layout], row_len: int | None = None, *, reencoded: bool = True
) -> AttentionMetadata:
    """Build the metadata of one row (B = 1) that holds the given examples in order, padded to `row_len`.

    `token_indices` gives the tokens of the row.

    Without `reencoded`, every local block has positions 0..n-1 and final blocks have their usual positions.
    This is an ablation of Ma et al. 2025. Sliding windows compare these positions: a local block is then as
    far from the question as the start of the prompt.

    Raises:
        ValueError: the examples are longer than `row_len`, or a layout has copies and positions are not
            re-encoded: no position is left before a block that starts at 0.
    """
    num_tokens = sum(layout.num_row_tokens for layout in layouts)
    row_len = num_tokens if row_len is None else row_len
    if num_tokens > row_len:
        raise ValueError(f"examples of {num_tokens} tokens do not fit into a row of {row_len}")
    if not reencoded and any(layout.num_first_copies for layout in layouts):
        raise ValueError("copies of the first block need re-encoded positions")
    # by NumPy, whose small operations take a fraction of the time of PyTorch's and wake no threads
    position_ids = np.zeros(row_len, np.int64)
    example_ids = np.full(row_len, PADDING, np.int32)
    block_ids = np.full(row_len, PADDING, np.int32)
    is_final = np.zeros(row_len, np.bool_)
    is_copy = np.zeros(row_len, np.bool_)
    start, block = 0, 0
    for example, layout in enumerate(layouts):
        num_local = len(layout.local_lengths)
        example_ids[start : start + layout.num_row_tokens] = example
        position = 0
        for index, length in enumerate(layout.block_lengths):
            copy_len = layout.block_lengths[0] if layout.has_copy(index) else 0
            tokens = slice(start, start + copy_len + length)
            if index >= num_local:
                position = layout.context_len
            elif not reencoded:
                position = 0
            position_ids[tokens] = np.arange(position - copy_len, position + length)
            block_ids[tokens] = block
            is_final[tokens] = index >= num_local
            if copy_len:
                is_copy[start : start + copy_len] = True
            start, block, position = tokens.stop, block + 1, position + length
    position_ids[start:] = np.arange(row_len - start)
    rows = (position_ids, example_ids, block_ids, is_final, is_copy)
    return AttentionMetadata(*(torch.from_numpy(ids)[None] for ids in rows))
