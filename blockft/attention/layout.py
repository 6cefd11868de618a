"""Where blocks stand: the layout of an example, and the per-token vectors that carry layouts to the device.

Shapes: B rows of a batch, T tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

PADDING = -1
"""The example id of padding tokens: padding is an example of its own."""


@dataclass(frozen=True)
class Layout:
    """How an example's tokens are cut into blocks: local blocks first, then one final block per question.

    ::

        block_lengths (3, 2 | 2, 2), num_final 2:   local 0 0 0 1 1   final 2 2   final 3 3
        position                                          0 1 2 3 4         5 6         5 6

    Each final block sees all local blocks and itself, and starts at the position after the context; with one
    final block this is Block-Attention (Ma et al. 2025, section 2.1), with one block in all it is full
    attention.

    Raises:
        ValueError: a block without tokens, or not between one and all blocks final.
    """

    block_lengths: tuple[int, ...]
    num_final: int = 1

    def __post_init__(self) -> None:
        if not self.block_lengths or min(self.block_lengths) < 1:
            raise ValueError(f"every block needs at least one token, found lengths {self.block_lengths}")
        if not 1 <= self.num_final <= len(self.block_lengths):
            raise ValueError(f"{self.num_final} of {len(self.block_lengths)} blocks cannot be final")

    @property
    def num_tokens(self) -> int:
        return sum(self.block_lengths)

    @property
    def local_lengths(self) -> tuple[int, ...]:
        return self.block_lengths[: -self.num_final]

    @property
    def final_lengths(self) -> tuple[int, ...]:
        return self.block_lengths[-self.num_final :]

    @property
    def context_len(self) -> int:
        """Tokens in local blocks: the position at which every final block starts."""
        return sum(self.local_lengths)

    def full(self) -> "Layout":
        """The layout of the same tokens in the full view.

        One question: a single block. Several: the context as one local block, which each question continues.
        """
        if self.num_final == 1:
            return Layout((self.num_tokens,))
        context = (self.context_len,) if self.context_len else ()
        return Layout((*context, *self.final_lengths), self.num_final)


@dataclass(frozen=True)
class AttentionMetadata:
    """What attention needs to know of every token of a batch; each a (B, T) tensor.

    position_ids  index of the token in its example as if its question stood alone (the re-encoded position)
    example_ids   which example of the row it belongs to; `PADDING` for none
    block_ids     which block of the row it belongs to
    is_final      whether that block is a final one
    """

    position_ids: torch.Tensor
    example_ids: torch.Tensor
    block_ids: torch.Tensor
    is_final: torch.Tensor

    def to(self, device: torch.device | str) -> "AttentionMetadata":
        return AttentionMetadata(*(vector.to(device) for vector in self.as_tuple()))

    def concatenate(self, other: "AttentionMetadata") -> "AttentionMetadata":
        """The vectors of longer rows: these tokens, then the other's."""
        pairs = zip(self.as_tuple(), other.as_tuple(), strict=True)
        return AttentionMetadata(*(torch.cat(pair, dim=1) for pair in pairs))

    def as_tuple(self) -> tuple[torch.Tensor, ...]:
        return self.position_ids, self.example_ids, self.block_ids, self.is_final


def build_metadata(
    layouts: Sequence[Layout], row_len: int | None = None, *, reencoded: bool = True
) -> AttentionMetadata:
    """The vectors of one row (B = 1) that holds the given examples one after the other, padded to `row_len`.

    Without re-encoding local blocks stand at positions 0..n-1, and only final blocks at their place: an
    ablation of Ma et al. 2025. Windows compare these positions as any others: seen through one, such a block
    lies as far from the question as the start of the prompt does.

    Raises:
        ValueError: the examples are longer than `row_len`.
    """
    num_tokens = sum(layout.num_tokens for layout in layouts)
    row_len = num_tokens if row_len is None else row_len
    if num_tokens > row_len:
        raise ValueError(f"examples of {num_tokens} tokens do not fit into a row of {row_len}")
    position_ids = torch.zeros(row_len, dtype=torch.int64)
    example_ids = torch.full((row_len,), PADDING, dtype=torch.int32)
    block_ids = torch.full((row_len,), PADDING, dtype=torch.int32)
    is_final = torch.zeros(row_len, dtype=torch.bool)
    start, block = 0, 0
    for example, layout in enumerate(layouts):
        num_local = len(layout.local_lengths)
        example_ids[start : start + layout.num_tokens] = example
        position = 0
        for index, length in enumerate(layout.block_lengths):
            tokens = slice(start, start + length)
            if index >= num_local:
                position = layout.context_len
            elif not reencoded:
                position = 0
            position_ids[tokens] = torch.arange(position, position + length)
            block_ids[tokens] = block
            is_final[tokens] = index >= num_local
            start, block, position = start + length, block + 1, position + length
    position_ids[start:] = torch.arange(row_len - start)
    return AttentionMetadata(*(vector[None] for vector in (position_ids, example_ids, block_ids, is_final)))
