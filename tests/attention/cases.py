"""Random inputs for attention over cached blocks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import torch

from blockft.attention.cached_context import TILE_PADDING, CachedContext, build_query_rotation
from blockft.attention.rope import RotaryEmbedding


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of attention of a batch of final blocks; see `attend_reference`."""

    q_BHTD: torch.Tensor
    cache_S2KD: torch.Tensor
    final_BS2KD: torch.Tensor
    context: CachedContext
    rotary: RotaryEmbedding
    scaling: float
    window: int | None

    def attend(self, function: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Return what `function` computes for these inputs."""
        return function(
            self.q_BHTD,
            self.cache_S2KD,
            self.final_BS2KD,
            self.context,
            build_query_rotation(self.rotary, self.context.offsets),
            scaling=self.scaling,
            window=self.window,
        )

    def to(self, target: torch.device | torch.dtype) -> "Case":
        """Return the inputs on a device, or with floating-point tensors of a type."""
        context = self.context
        if isinstance(target, torch.device):
            context = CachedContext(**{name: ids.to(target) for name, ids in vars(context).items()})
        floating = {name: getattr(self, name).to(target) for name in ("q_BHTD", "cache_S2KD", "final_BS2KD")}
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
    max_query_start: int = 9,
    num_programs: int = 3,
    window: int | None = None,
) -> Case:
    """Return inputs with up to `max_blocks` blocks per prompt; some have two chunks, some are shared."""
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    query_start = rng.randint(0, max_query_start)
    num_slots = max_blocks * max_len
    chunk_fields = [torch.zeros(num_prompts, 2 * max_blocks, dtype=torch.int32) for _ in range(4)]
    program_bounds = torch.zeros(num_prompts, num_programs + 1, dtype=torch.int32)
    pad_lens, position_shifts = (torch.zeros(num_prompts, dtype=torch.int32) for _ in range(2))
    for b in range(num_prompts):
        position, n = 0, 0
        for _ in range(rng.randint(0, max_blocks)):
            length = rng.randint(1, max_len)
            slot, half = rng.randint(0, num_slots - length), rng.choice([0, length // 2])
            for start, end in ((0, half), (half, length)):
                if end > start:
                    chunk = (slot + start, end - start, start, position)
                    for field, value in zip(chunk_fields, chunk, strict=True):
                        field[b, n] = value
                    n += 1
            position += length
        inner = sorted(rng.randint(0, n) for _ in range(num_programs - 1))
        program_bounds[b] = torch.tensor([0, *inner, n])
        pad_lens[b] = rng.randint(0, query_start + num_queries - 1)
        position_shifts[b] = position - pad_lens[b]
    slots, lengths, starts, offsets = chunk_fields

    def random_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    num_rotated = num_rotated or head_size
    return Case(
        q_BHTD=random_tensor(num_prompts, num_queries, num_heads, head_size).transpose(1, 2),
        cache_S2KD=random_tensor(num_slots + TILE_PADDING, 2, num_kv_heads, head_size),
        final_BS2KD=random_tensor(
            num_prompts, query_start + num_queries + TILE_PADDING, 2, num_kv_heads, head_size
        ),
        context=CachedContext(
            slots=slots,
            lengths=lengths,
            starts=starts,
            offsets=offsets,
            program_bounds=program_bounds,
            query_start=torch.tensor([query_start], dtype=torch.int32),
            pad_lens=pad_lens,
            position_shifts=position_shifts,
        ),
        rotary=RotaryEmbedding(1.0 / 10000.0 ** (torch.arange(0, num_rotated, 2).double() / num_rotated)),
        scaling=head_size**-0.5,
        window=window,
    )
