"""Reference inference path: rotate cached keys to their prompt positions, concatenate, prefill, decode.

This is the reference for `rotate_queries`. It runs on any device and for every supported family.
Shapes: B prompts of a batch, T query tokens, S key tokens, n tokens of a block, L layers, K key/value heads,
D head size, R rotated dimensions of a head (R <= D).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from transformers import DynamicCache, PreTrainedModel

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import PADDING, AttentionMetadata, Layout, build_metadata
from blockft.attention.rope import RotaryEmbedding, rotate
from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, first_ids, num_first, num_tokens, token_ids
from blockft.units import format_count


@torch.inference_mode()
def prefill_blocks(
    model: PreTrainedModel, keys: Iterable[BlockKey], max_tokens: int = 4096
) -> Iterator[tuple[BlockKey, torch.Tensor]]:
    """Compute each distinct block independently, several per forward pass of at most `max_tokens` tokens.

    A longer block gets its own pass. Yields each block's keys (at positions 0..n-1) and values:
    (L, n, 2, K, D), in memory that is not overwritten later. A block that sees a first block is computed
    right after it, and the first block is not yielded.

    The tokens of other blocks in the pass do not change a bit of a block. Their number may change its
    rounding, because matrix products of another size add in another order.

    Raises:
        UserError: a block has values that are not finite. The finite blocks of its pass were yielded before.
    """
    for group in _groups(dict.fromkeys(keys), max_tokens):
        layers = _prefill_group(model, group)
        # A masked value has weight 0, but 0 times infinity is not 0: such a block would change the others of
        # its pass, and those that lie beside it in memory, which may belong to other users.
        if _are_finite(layers):
            yield from _split_group(group, layers)
            continue
        overflowing = []
        for key in group:
            layers = _prefill_group(model, [key])
            if _are_finite(layers):
                yield from _split_group([key], layers)
            else:
                overflowing.append(key)
        if overflowing:
            dtype = str(model.dtype).removeprefix("torch.")
            raise UserError(
                f"in {dtype} the model computes values that are not finite for "
                f"{format_count(len(overflowing), 'block')} of the prompts (the first has "
                f"{num_tokens(overflowing[0])} tokens): leave the document out, or load the model with "
                "another dtype"
            )


def _are_finite(layers: Sequence[torch.Tensor]) -> bool:
    return bool(torch.stack([layer.isfinite().all() for layer in layers]).all())


def _prefill_group(model: PreTrainedModel, group: Sequence[BlockKey]) -> list[torch.Tensor]:
    """Return the keys and values (2, K, T, D) of each layer for blocks that share a forward pass.

    The blocks see the same first block, which the pass computes once, at the positions before 0::

        first a b, blocks c d e | f g      ids       a  b c d e f g
                                           position -2 -1 0 1 2 0 1
    """
    first, lengths = first_ids(group[0]), [num_tokens(key) for key in group]
    if first:
        # every block continues the first one as a question continues a shared context
        layouts = [Layout((len(first), *lengths), num_final=len(lengths))]
    else:
        # as an example of its own, a block has positions 0..n-1 and attends to nothing else
        layouts = [Layout((length,)) for length in lengths]
    metadata = build_metadata(layouts).to(model.device)
    ids = [*first, *chain.from_iterable(map(token_ids, group))]
    cache = DynamicCache()
    model.base_model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=metadata.position_ids - len(first),
        block_masks=AttentionMasks(metadata),
        past_key_values=cache,
        use_cache=True,
    )
    return [torch.stack((keys[0], values[0]))[:, :, len(first) :] for keys, values, *_ in cache]


def _split_group(
    group: Sequence[BlockKey], layers: Sequence[torch.Tensor]
) -> Iterator[tuple[BlockKey, torch.Tensor]]:
    """Yield the keys and values (L, n, 2, K, D) of each block of a group."""
    start = 0
    for key in group:
        tokens = slice(start, start := start + num_tokens(key))
        yield key, torch.stack([layer[:, :, tokens].permute(2, 0, 1, 3) for layer in layers])


class RotatedKeysBatch:
    """A batch of prompts whose local blocks are concatenated, ready for final blocks and decoding.

    ::

        row 0   . . c c c c c | . f f f | n | n      c context, f final block, n decoded, . padding
        row 1   c c c c c c c | f f f f | n | n

    Padding attends to padding alone, so prompts of different lengths can share a batch. With `reencoded`,
    blocks move to their position in the prompt; otherwise they stay at positions 0..n-1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rotaries: Sequence[RotaryEmbedding],
        contexts: Sequence[Sequence[BlockKey]],
        blocks: Mapping[BlockKey, torch.Tensor],
        *,
        reencoded: bool = True,
    ) -> None:
        self._model = model
        self._lengths = torch.tensor([sum(map(num_tokens, context)) for context in contexts])
        self._metadata = _next_columns(torch.zeros_like(self._lengths), self._lengths, is_final=False)
        if not reencoded:
            self._metadata = replace(self._metadata, position_ids=_local_positions(contexts))
        self._cache = DynamicCache()
        if not int(self._lengths.max()):
            return
        rotations: dict[int, list[_KeyRotation]] = {}
        for layer, rotary in enumerate(rotaries):
            if reencoded and id(rotary) not in rotations:
                rotations[id(rotary)] = [_key_rotation(context, rotary, model.device) for context in contexts]
            keys_values = _concatenate(contexts, blocks, layer, rotations.get(id(rotary)))
            self._cache.update(*keys_values, layer)

    @torch.inference_mode()
    def decode_step(self, new_ids: Sequence[Sequence[int]], num_logits: int = 1) -> torch.Tensor:
        """Append at least one token to every final block; the numbers may differ.

        Returns the logits of the last `num_logits` columns, in which tokens are right aligned:
        (B, num_logits, vocabulary).
        """
        num_new = torch.tensor([len(ids) for ids in new_ids])
        columns = _next_columns(self._lengths, num_new, is_final=True)
        self._lengths = self._lengths + num_new
        self._metadata = self._metadata.concatenate(columns)
        num_queries, device = int(num_new.max()), self._model.device
        padded = [[0] * (num_queries - len(ids)) + list(ids) for ids in new_ids]
        logits: torch.Tensor = self._model(
            input_ids=torch.tensor(padded, device=device),
            position_ids=columns.position_ids.to(device),
            block_masks=AttentionMasks(self._metadata.to(device)),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=num_logits,
        ).logits
        return logits


def _next_columns(starts: torch.Tensor, lengths: torch.Tensor, is_final: bool) -> AttentionMetadata:
    """Build the metadata of the next tokens of every prompt, right aligned, from (B,) starts and lengths."""
    index = torch.arange(int(lengths.max())) - (lengths.max() - lengths)[:, None]
    is_token = index >= 0
    return AttentionMetadata(
        position_ids=torch.where(is_token, starts[:, None] + index, 0),
        example_ids=torch.where(is_token, 0, PADDING),
        block_ids=torch.full_like(index, int(is_final)),
        is_final=is_token & is_final,
        is_copy=torch.zeros_like(is_token),
    )


def _local_positions(contexts: Sequence[Sequence[BlockKey]]) -> torch.Tensor:
    """Return the positions of blocks that stay at 0..n-1, right aligned: (B, S)."""
    rows = [[position for key in context for position in range(num_tokens(key))] for context in contexts]
    longest = max(map(len, rows))
    return torch.tensor([[0] * (longest - len(row)) + row for row in rows], dtype=torch.int64)


_KeyRotation = tuple[torch.Tensor, torch.Tensor]
"""The cosines and sines that move keys to their positions: (S, 1, R / 2) each."""


def _key_rotation(context: Sequence[BlockKey], rotary: RotaryEmbedding, device: torch.device) -> _KeyRotation:
    """Return the rotation of the keys of all blocks of a context but the first, which stays where it is."""
    lengths = torch.tensor([num_tokens(key) for key in context], dtype=torch.int64)
    offsets, repeats = lengths.cumsum(0)[:-1].to(device), lengths[1:].to(device)
    num_moved = int(lengths[1:].sum())
    cos, sin = (
        angles.repeat_interleave(repeats, dim=0, output_size=num_moved)[:, None]
        for angles in rotary.cos_sin(offsets, device)
    )
    return cos, sin


def _concatenate(
    contexts: Sequence[Sequence[BlockKey]],
    blocks: Mapping[BlockKey, torch.Tensor],
    layer: int,
    rotations: Sequence[_KeyRotation] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's keys and values of all contexts, left padded: (B, K, S, D) each.

    Keys move to their positions in the prompt, unless `rotations` is None.
    """
    longest = max(sum(map(num_tokens, context)) for context in contexts)
    some_n2KD = next(iter(blocks.values()))[layer]
    kv_BS2KD = some_n2KD.new_zeros((len(contexts), longest, *some_n2KD.shape[1:]))
    for b, context in enumerate(contexts):
        if not context:
            continue
        start = longest - sum(map(num_tokens, context))
        torch.cat([blocks[key][layer] for key in context], out=kv_BS2KD[b, start:])
        if rotations is not None:
            # a shift by 0 changes no bit of a key
            keys_SKD = kv_BS2KD[b, start + num_tokens(context[0]) :, 0]
            keys_SKD.copy_(rotate(keys_SKD, *rotations[b]))
    keys, values = kv_BS2KD.permute(2, 0, 3, 1, 4)
    return keys, values


def _groups(keys: Iterable[BlockKey], max_tokens: int) -> Iterator[list[BlockKey]]:
    """Yield blocks in groups that see the same first block, if any, with at most `max_tokens` tokens.

    A longer block is its own group. The first block counts once in each group. Blocks that see the same first
    block keep their order.
    """
    by_first: dict[bytes, list[BlockKey]] = {}
    for key in keys:
        by_first.setdefault(key.first, []).append(key)
    for same_first in by_first.values():
        group: list[BlockKey] = []
        for key in same_first:
            if group and num_first(key) + sum(map(num_tokens, group)) + num_tokens(key) > max_tokens:
                yield group
                group = []
            group.append(key)
        yield group
