"""Block mode without fine-tuning, as published methods compute it: baselines of an evaluation.

Every method is computed by masked forward passes over whole prompts. No block cache is read or written.

::

    pass 1, encode   the local blocks under the block mask; their keys and values are kept
    pass 2, read     the final block, and the context tokens that the method recomputes

Shapes: B prompts of a batch, T tokens of a row, S key tokens, Q query tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import DynamicCache, PreTrainedModel

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import PADDING, AttentionMetadata, Layout, build_metadata
from blockft.attention.mask import build_mask_mod
from blockft.attention.scaled_context import ScaledContextAttention

RecomputedTokens = Literal["first", "deviation"]
"""Which context tokens are recomputed: the first tokens of each block, or those whose keys and values differ
most between block and full mode."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How block mode is computed. The defaults are the block mask with re-encoded positions.

    reencoded          whether blocks stand at their positions in the prompt, or all at positions 0..n-1. The
                       second is what Prompt Cache does (arXiv 2311.04934), with one position for all blocks.
    start_tokens       this many first tokens of the first block (all for None) stand before every other
                       block while it is encoded. The final block reads them once. See `_build_row`. None is
                       the block mode of a model that was trained with `local_sees_first`.
    temperature        see `ScaledContextAttention`; shared start tokens are not scaled
    scale              see `ScaledContextAttention`
    recomputed_share   the share of context tokens, without the first block, that are computed again over the
                       keys and values of all blocks (CacheBlend, arXiv 2405.16444). The first block has no
                       block before it: its keys and values are those of full mode.
    recomputed_tokens  how these tokens are chosen
    deviation_layer    the layer, counted from 0, whose keys and values are compared by "deviation". Those of
                       layer 0 do not depend on other tokens.
    """

    reencoded: bool = True
    start_tokens: int | None = 0
    temperature: float = 1
    scale: float = 1
    recomputed_share: float = 0
    recomputed_tokens: RecomputedTokens = "first"
    deviation_layer: int = 1

    def __post_init__(self) -> None:
        assert self.reencoded or self.start_tokens == 0, "positions before a block at position 0"


@dataclass(frozen=True)
class _Row:
    """The tokens of one prompt as pass 1 takes them.

    ids          all tokens, copies of the shared start tokens included
    metadata     of these tokens, B = 1
    context      the indices of the context tokens that the final block reads
    later        the indices of those after the first block, the first tokens of all blocks first
    final        the indices of the final block
    num_shared   how many of the first context tokens are the shared start
    """

    ids: list[int]
    metadata: AttentionMetadata
    context: list[int]
    later: list[int]
    final: list[int]
    num_shared: int


def _build_row(prompt: Sequence[Sequence[int]], method: Method) -> _Row:
    """Build the row of a prompt.

    ::

        blocks a b c | d e | f g | h i, 2 start tokens
        ids            a b c   a b d e   a b f g   h i
        block          0 0 0   1 1 1 1   2 2 2 2   3 3
        position       0 1 2   1 2 3 4   3 4 5 6   7 8
        context        x x x       x x       x x

    A block stands right after its own copy of the start. Its keys and values therefore depend on the start
    and on its own tokens, not on its place in the prompt.
    """
    num_local = len(prompt) - 1
    start = list(prompt[0])[: method.start_tokens] if num_local else []
    ids, lengths, context, in_block = list[int](), list[int](), list[int](), list[tuple[int, int]]()
    for block, tokens in enumerate(prompt):
        copied = start if 0 < block < num_local else []
        first = len(ids) + len(copied)
        ids += [*copied, *tokens]
        lengths.append(len(copied) + len(tokens))
        if block < num_local:
            context += range(first, len(ids))
        if 0 < block < num_local:
            in_block += enumerate(range(first, len(ids)))
    metadata = build_metadata([Layout(tuple(lengths))], reencoded=method.reencoded)
    if start:
        num_copies = metadata.block_ids.clamp(max=num_local - 1)
        is_copy = torch.ones_like(metadata.is_copy)
        is_copy[:, [*context, *range(len(ids) - len(prompt[-1]), len(ids))]] = False
        position_ids = metadata.position_ids - len(start) * num_copies
        metadata = replace(metadata, position_ids=position_ids, is_copy=is_copy)
    return _Row(
        ids=ids,
        metadata=metadata,
        context=context,
        later=[index for _, index in sorted(in_block)],
        final=list(range(len(ids) - len(prompt[-1]), len(ids))),
        num_shared=len(start),
    )


class _OrderedMasks(AttentionMasks):
    """The masks of keys that are some tokens of rows in any order: `order_BS` holds their indices."""

    def __init__(self, metadata: AttentionMetadata, order_BS: torch.Tensor) -> None:
        super().__init__(AttentionMetadata(*(ids.gather(1, order_BS) for ids in metadata.as_tuple())))
        self._rows, self._order_BS = metadata, order_BS

    def dense(self, window: int | None, num_queries: int) -> torch.Tensor:
        """Return the dense mask; the queries are the last keys: (B, 1, T, S) bool."""
        if (window, num_queries) not in self._dense:
            mask_mod = build_mask_mod(self._rows, window)
            b = torch.arange(len(self._order_BS), device=self._order_BS.device)[:, None, None, None]
            q, k = self._order_BS[:, None, -num_queries:, None], self._order_BS[:, None, None]
            self._dense[window, num_queries] = mask_mod(b, 0, q, k)
        return self._dense[window, num_queries]


class MethodBatch:
    """A batch of prompts whose context is encoded as a method says.

    prompts: the token ids of each prompt's blocks; the last block is the final block.

    The model needs the attention backend `block_cached`.
    """

    @torch.inference_mode()
    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[Sequence[int]]], method: Method
    ) -> None:
        # another backend would ignore the scaled attention silently
        assert model.config._attn_implementation == "block_cached"
        self._model, self._method = model, method
        rows = [_build_row(prompt, method) for prompt in prompts]
        # every row ends with at least one token of padding, which fills lists of indices
        row_len = max(len(row.ids) for row in rows) + 1
        self._padding = row_len - 1
        self._ids_BT = self._tensor([row.ids + [0] * (row_len - len(row.ids)) for row in rows])
        self._metadata = _stack([row.metadata for row in rows], row_len).to(model.device)
        encoded = self._encode(
            self._metadata, max((row.context[-1] + 1 for row in rows if row.context), default=0)
        )
        recomputed = self._choose(rows, encoded)
        if method.recomputed_share:
            self._metadata = self._full_mode()
        kept = [
            [i for i in row.context if i not in again] for row, again in zip(rows, recomputed, strict=True)
        ]
        self._cache = self._select(encoded, kept)
        self._order_BS = self._indices(kept)
        self._is_context_BS = self._order_BS != self._padding
        num_shared = self._tensor([row.num_shared for row in rows])
        self._is_context_BS &= self._order_BS >= num_shared[:, None]
        self._read = [sorted(again) + row.final for row, again in zip(rows, recomputed, strict=True)]
        self._num_tokens = self._tensor([len(row.context) + len(row.final) for row in rows])

    def prefill(self) -> torch.Tensor:
        """Read the final blocks and return the logits of their last tokens: (B, vocabulary)."""
        return self._forward(self._indices(self._read))

    def decode_step(self, next_ids: Sequence[int]) -> torch.Tensor:
        """Append one token to every final block and return its logits: (B, vocabulary)."""
        final_ids = self._metadata.block_ids.where(self._metadata.is_final, PADDING)
        last = final_ids.amax(dim=1, keepdim=True)
        columns = AttentionMetadata(
            position_ids=self._num_tokens[:, None],
            example_ids=torch.zeros_like(last),
            block_ids=last,
            is_final=torch.ones_like(last, dtype=torch.bool),
            is_copy=torch.zeros_like(last, dtype=torch.bool),
        )
        self._num_tokens = self._num_tokens + 1
        self._metadata = self._metadata.concatenate(columns)
        self._ids_BT = torch.cat((self._ids_BT, self._tensor(next_ids)[:, None]), dim=1)
        return self._forward(torch.full_like(self._ids_BT[:, :1], self._ids_BT.shape[1] - 1))

    @torch.inference_mode()
    def _forward(self, queries_BQ: torch.Tensor) -> torch.Tensor:
        """Append the tokens at these indices to the keys, and return the last logits."""
        self._order_BS = torch.cat((self._order_BS, queries_BQ), dim=1)
        self._is_context_BS = torch.nn.functional.pad(self._is_context_BS, (0, queries_BQ.shape[1]))
        masks, method, scaled = _OrderedMasks(self._metadata, self._order_BS), self._method, None
        if (method.temperature, method.scale) != (1, 1):
            scaled = ScaledContextAttention(
                masks=masks,
                is_context_BS=self._is_context_BS,
                temperature=method.temperature,
                scale=method.scale,
            )
        logits: torch.Tensor = self._model(
            input_ids=self._ids_BT.gather(1, queries_BQ),
            position_ids=self._metadata.position_ids.gather(1, queries_BQ),
            block_masks=masks,
            cached_attention=scaled,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def _encode(self, metadata: AttentionMetadata, num_tokens: int) -> DynamicCache:
        """Return the keys and values of the first tokens of all rows."""
        cache = DynamicCache()
        if num_tokens:
            metadata = AttentionMetadata(*(ids[:, :num_tokens] for ids in metadata.as_tuple()))
            self._model.base_model(
                input_ids=self._ids_BT[:, :num_tokens],
                position_ids=metadata.position_ids,
                block_masks=AttentionMasks(metadata),
                past_key_values=cache,
                use_cache=True,
            )
        return cache

    def _full_mode(self) -> AttentionMetadata:
        """Return the metadata of the same tokens as one block, without the copies of the start."""
        is_token = (self._metadata.example_ids != PADDING) & ~self._metadata.is_copy
        return replace(self._metadata, block_ids=torch.where(is_token, 0, self._metadata.block_ids))

    def _choose(self, rows: Sequence[_Row], encoded: DynamicCache) -> list[set[int]]:
        """Return the indices of the context tokens that are recomputed, for each row."""
        share = self._method.recomputed_share
        if not share or not any(row.later for row in rows):
            return [set() for _ in rows]
        candidates = [row.later for row in rows]
        if self._method.recomputed_tokens == "deviation":
            deviation = self._deviation(encoded).tolist()
            candidates = [
                sorted(later, key=values.__getitem__, reverse=True)
                for later, values in zip(candidates, deviation, strict=True)
            ]
        return [set(later[: round(share * len(later))]) for later in candidates]

    def _deviation(self, encoded: DynamicCache) -> torch.Tensor:
        """Return the squared distance of a layer's keys and values between block and full mode: (B, T)."""
        layer = self._method.deviation_layer
        found, num_tokens = [*encoded][layer][:2], encoded.get_seq_length()
        # the layers after this one are computed, too, and not used
        expected = [*self._encode(self._full_mode(), num_tokens)][layer][:2]
        pairs = zip(found, expected, strict=True)
        return sum((a.float() - b.float()).square().sum(dim=(1, 3)) for a, b in pairs)

    def _select(self, encoded: DynamicCache, kept: Sequence[Sequence[int]]) -> DynamicCache:
        """Return the keys and values of the kept tokens. Shorter rows are filled with those of any token."""
        cache = DynamicCache()
        if any(kept):
            indices_BS = self._indices(kept)
            indices_BS = indices_BS.where(indices_BS != self._padding, 0)
            for layer, (keys_BKTD, values_BKTD, *_) in enumerate(encoded):
                index = indices_BS[:, None, :, None].expand(-1, keys_BKTD.shape[1], -1, keys_BKTD.shape[3])
                cache.update(keys_BKTD.gather(2, index), values_BKTD.gather(2, index), layer)
        return cache

    def _indices(self, lists: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return lists of indices, right aligned and filled with the index of a token of padding."""
        longest = max(map(len, lists))
        return self._tensor([[self._padding] * (longest - len(some)) + list(some) for some in lists])

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)


def _stack(rows: Sequence[AttentionMetadata], row_len: int) -> AttentionMetadata:
    """Return the metadata of a batch of rows (each B = 1), padded to `row_len`."""
    padding = build_metadata([], row_len).as_tuple()
    padded = [
        [
            torch.cat((ids, fill[:, ids.shape[1] :]), dim=1)
            for ids, fill in zip(row.as_tuple(), padding, strict=True)
        ]
        for row in rows
    ]
    return AttentionMetadata(*(torch.cat(ids) for ids in zip(*padded, strict=True)))
