"""Random final blocks over random cached blocks, for every way to compute their attention."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from blockft.attention.positions import RotaryEmbedding
from blockft.attention.rotate_queries import SLACK, CachedContext, build_query_rotation


@dataclass(frozen=True, kw_only=True)
class Case:
    """What attention of a batch of final blocks reads; see `CachedAttention`."""

    q_BHTD: torch.Tensor
    cache_S2KD: torch.Tensor
    final_BS2KD: torch.Tensor
    context: CachedContext
    rotation: RotaryEmbedding
    scaling: float
    window: int | None

    def attend(self, function: Callable[..., torch.Tensor]) -> torch.Tensor:
        return function(
            self.q_BHTD,
            self.cache_S2KD,
            self.final_BS2KD,
            self.context,
            build_query_rotation(self.rotation, self.context.offsets),
            scaling=self.scaling,
            window=self.window,
        )

    def to(self, *where: Any) -> "Case":
        """The tensors on a device, or the floating ones in a type."""
        context = self.context
        if isinstance(where[0], torch.device):
            context = CachedContext(**{name: part.to(*where) for name, part in vars(context).items()})
        floating = {name: getattr(self, name).to(*where) for name in ("q_BHTD", "cache_S2KD", "final_BS2KD")}
        return replace(self, context=context, **floating)


def make_case(
    seed: int,
    *,
    num_prompts: int = 3,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_size: int = 16,
    num_rotated: int | None = None,
    num_queries: int = 5,
    max_blocks: int = 4,
    max_len: int = 40,
    max_column: int = 9,
    num_programs: int = 3,
    window: int | None = None,
) -> Case:
    """Up to `max_blocks` blocks for each prompt, some of which are cut into pieces and shared by prompts."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    column = rng.randint(0, max_column)
    num_slots = max_blocks * max_len
    rows = [torch.zeros(num_prompts, 2 * max_blocks, dtype=torch.int32) for _ in range(4)]
    shares = torch.zeros(num_prompts, num_programs + 1, dtype=torch.int32)
    first, shift = (torch.zeros(num_prompts, dtype=torch.int32) for _ in range(2))
    for b in range(num_prompts):
        position, n = 0, 0
        for _ in range(rng.randint(0, max_blocks)):
            length = rng.randint(1, max_len)
            slot, half = rng.randint(0, num_slots - length), rng.choice([0, length // 2])
            for start, end in ((0, half), (half, length)):
                if end > start:
                    for row, fact in zip(rows, (slot + start, end - start, start, position), strict=True):
                        row[b, n] = fact
                    n += 1
            position += length
        inner = sorted(rng.randint(0, n) for _ in range(num_programs - 1))
        shares[b] = torch.tensor([0, *inner, n])
        first[b] = rng.randint(0, column + num_queries - 1)
        shift[b] = position - first[b]
    slots, lengths, starts, offsets = rows

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    num_rotated = num_rotated or head_size
    return Case(
        q_BHTD=some(num_prompts, num_queries, num_heads, head_size).transpose(1, 2),
        cache_S2KD=some(num_slots + SLACK, 2, num_kv_heads, head_size),
        final_BS2KD=some(num_prompts, column + num_queries + SLACK, 2, num_kv_heads, head_size),
        context=CachedContext(
            slots=slots,
            lengths=lengths,
            starts=starts,
            offsets=offsets,
            shares=shares,
            column=torch.tensor([column], dtype=torch.int32),
            first=first,
            shift=shift,
        ),
        rotation=RotaryEmbedding(1.0 / 10000.0 ** (torch.arange(0, num_rotated, 2).double() / num_rotated)),
        scaling=head_size**-0.5,
        window=window,
    )
