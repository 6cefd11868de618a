"""Inference path for GPUs: cached blocks stay in the device tier; the queries are rotated for each block.

Shapes: B prompts, T query tokens, N chunks of a prompt's context, L layers, S columns of a final block, K
key/value heads, D head size.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from blockft.attention.cached_context import TILE_PADDING, build_query_rotation
from blockft.attention.rope import RotaryEmbedding
from blockft.attention.rotate_queries import CachedAttention
from blockft.inference.block_key import BlockKey, num_tokens
from blockft.inference.cuda_graph import GraphInputs, GraphSize
from blockft.inference.device_tier import DeviceTier, use_device

CHUNK_LEN = 512
"""Longer blocks are read in chunks of at most this many tokens, so that programs share them evenly."""

MAX_GRAPH_TOKENS = 1024
"""Batches with more query tokens run without a CUDA graph. They keep the GPU busy enough to hide launches."""

MAX_GRAPHS = 24
"""The number of graphs kept; the least recently used is dropped. Each holds the activations of its size."""


class CacheInvalidated(Exception):
    """Another batch has started since and may have evicted this batch's blocks: prefill this batch again."""


class QueryRotationRunner:
    """Runs a model's final blocks over the blocks of a device tier, on a GPU with CUDA graphs.

    rotaries        the rotary embedding of each layer
    use_triton      compute attention with the Triton kernels
    use_graphs      capture CUDA graphs
    reencoded       whether blocks move to their positions in the prompt; otherwise they stay at 0..n-1
    eager_context   called around forward passes without a graph
    current_batch   the batch that may decode; a batch that is not current raises `CacheInvalidated`
    layer_loaded    on a GPU an event per layer; passes wait for it before they read the layer of the cache
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rotaries: Sequence[RotaryEmbedding],
        tier: DeviceTier,
        *,
        use_triton: bool,
        use_graphs: bool,
        reencoded: bool = True,
        eager_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.tier = model, tier
        self.use_triton, self.use_graphs, self.reencoded = use_triton, use_graphs, reencoded
        self._eager_context = eager_context
        # external events: a graph waits for the latest record, not for the one at its capture
        num_events = tier.shape.num_layers if model.device.type == "cuda" else 0
        self.layer_loaded = [torch.cuda.Event(external=True) for _ in range(num_events)]
        for event in self.layer_loaded:
            event.record()
        self.current_batch: RotatedQueriesBatch | None = None
        self._rotaries = rotaries
        self._final_buffers: WeakValueDictionary[tuple[int, int], torch.Tensor] = WeakValueDictionary()
        self._graph_inputs: OrderedDict[GraphSize, GraphInputs] = OrderedDict()
        self._group = model.config.num_attention_heads // tier.shape.num_kv_heads

    def start_batch(
        self, contexts: Sequence[Sequence[BlockKey]], max_final_len: int
    ) -> "RotatedQueriesBatch":
        """Return a batch over blocks in the tier. A final block has at most `max_final_len` tokens."""
        return RotatedQueriesBatch(self, contexts, max_final_len)

    def inputs(self, size: GraphSize) -> GraphInputs:
        """Return the inputs of passes of one size. They are kept if such passes run with a graph."""
        if size in self._graph_inputs:
            self._graph_inputs.move_to_end(size)
            return self._graph_inputs[size]
        inputs = GraphInputs(size, self.model.device, self._final_buffer(size.num_prompts, size.num_columns))
        if self.use_graphs and size.num_prompts * size.num_queries <= MAX_GRAPH_TOKENS:
            while len(self._graph_inputs) >= MAX_GRAPHS:
                self._graph_inputs.popitem(last=False)
            self._graph_inputs[size] = inputs
        return inputs

    def padded_len(self, num_prompts: int, num_queries: int) -> int:
        """Return the number of columns for the first tokens of final blocks.

        Where a graph is captured it is one of few values, so that few graphs are needed.
        """
        padded = _round_up(num_queries)
        return padded if self.use_graphs and num_prompts * padded <= MAX_GRAPH_TOKENS else num_queries

    def num_programs(self, num_prompts: int, num_queries: int) -> int:
        """Return the number of Triton programs that share each prompt's context."""
        if not self.use_triton:
            return 1
        from blockft.attention.triton_launch import choose_num_programs

        shape = self.tier.shape
        rows, heads = self._group * num_queries, num_prompts * shape.num_kv_heads
        half = self._rotaries[0].inv_freq.numel()
        return choose_num_programs(rows, heads, shape.head_size, half, shape.torch_dtype, self.model.device)

    def run(self, inputs: GraphInputs) -> torch.Tensor:
        """Run one forward pass and return its logits: (B, num_logits, vocabulary)."""
        if inputs.size not in self._graph_inputs:
            with self._eager_context():
                return self._forward(inputs)
        if inputs.graph is None:
            inputs.capture(lambda: self._forward(inputs))
        assert inputs.graph and inputs.logits is not None
        inputs.graph.replay()
        return inputs.logits

    def _final_buffer(self, num_prompts: int, num_columns: int) -> torch.Tensor:
        """Return the buffer for keys and values of final blocks: (L, B, S, 2, K, D).

        Inputs of the same size share a buffer while any of them lives. Kept graphs hold their buffers, up to
        half of the size of the device tier.
        """
        buffer = self._final_buffers.get((num_prompts, num_columns))
        if buffer is None:
            shape = self.tier.shape
            size = (shape.num_layers, num_prompts, *shape.layer_shape(num_columns))
            budget = self.tier.cache_LS2KD.nbytes // 2 - num_prompts * num_columns * shape.token_bytes
            while self._graph_inputs and sum(other.nbytes for other in self._final_buffers.values()) > budget:
                self._graph_inputs.popitem(last=False)
            # zeros, as in the device tier
            buffer = torch.zeros(size, dtype=shape.torch_dtype, device=self.model.device)
            self._final_buffers[num_prompts, num_columns] = buffer
        return buffer

    def _wait_for_layer(self, layer: int) -> None:
        torch.cuda.current_stream().wait_event(self.layer_loaded[layer])

    def _forward(self, inputs: GraphInputs) -> torch.Tensor:
        different = {id(rotary): rotary for rotary in self._rotaries}
        rotations = {
            key: build_query_rotation(rotary, inputs.context.offsets) for key, rotary in different.items()
        }
        cached_attention = CachedAttention(
            cache_LS2KD=self.tier.cache_LS2KD,
            final_LBS2KD=inputs.final_LBS2KD,
            context=inputs.context,
            layer_rotations=[rotations[id(rotary)] for rotary in self._rotaries],
            use_triton=self.use_triton,
            wait_for_layer=self._wait_for_layer if self.layer_loaded else None,
        )
        logits: torch.Tensor = self.model(
            input_ids=inputs.ids,
            position_ids=inputs.positions,
            cached_attention=cached_attention,
            use_cache=False,
            logits_to_keep=inputs.size.num_logits,
        ).logits
        return logits


class RotatedQueriesBatch:
    """A batch of prompts whose local blocks are in the device tier, ready for final blocks and decoding.

    ::

        columns   0 1 2 3 4 5 6 7
        prompt 0  . . . f f f n n      f final block, n decoded, . padding
        prompt 1  . f f f f f n n

    inputs  those of the last step, by which `QueryRotationRunner.run` repeats its forward pass. They keep the
            buffer of the final blocks alive until the next step.
    """

    def __init__(
        self, runner: QueryRotationRunner, contexts: Sequence[Sequence[BlockKey]], max_final_len: int
    ) -> None:
        self._runner, self._num_columns = runner, max_final_len
        self._contexts = contexts
        self._context_lens = [sum(map(num_tokens, context)) for context in contexts]
        self._chunks: list[np.ndarray] = []
        self._query_start = 0
        self._pad_lens: list[int] = []
        self.inputs: GraphInputs | None = None

    @torch.inference_mode()
    def decode_step(
        self,
        new_ids: Sequence[Sequence[int]],
        num_logits: int = 1,
    ) -> torch.Tensor:
        """Append at least one token to every final block; after the first step, the same number to all.

        Returns the logits of the last `num_logits` columns: (B, num_logits, vocabulary). The next call
        overwrites them.

        Raises:
            CacheInvalidated: another batch has started since the last step.
        """
        runner, longest = self._runner, max(map(len, new_ids))
        if self._pad_lens and runner.current_batch is not self:
            raise CacheInvalidated
        runner.current_batch = self
        num_queries = longest if self._pad_lens else runner.padded_len(len(new_ids), longest)
        if not self._pad_lens:
            self._pad_lens = [num_queries - len(ids) for ids in new_ids]
            self._num_columns += num_queries - longest
        num_programs = runner.num_programs(len(new_ids), num_queries)
        if not self._chunks:
            self._chunks = [
                _chunks(context, runner.tier, num_programs, runner.reencoded) for context in self._contexts
            ]
        size = GraphSize(
            num_prompts=len(new_ids),
            num_queries=num_queries,
            num_columns=_buffer_columns(self._num_columns),
            num_chunks=max(16, _round_up(max(map(len, self._chunks)))),
            num_logits=num_logits,
            num_programs=num_programs,
        )
        with use_device(runner.model.device):
            inputs = runner.inputs(size)
            inputs.fill(new_ids, self._chunks, self._query_start, self._pad_lens, self._context_lens)
            self._query_start += num_queries
            self.inputs = inputs
            return runner.run(inputs)


def _chunks(context: Sequence[BlockKey], tier: DeviceTier, num_programs: int, reencoded: bool) -> np.ndarray:
    """Return slot, length, start in its block and offset of every chunk of a context: (N, 4) int32.

    Chunks are shorter where the context is too short to occupy all programs. Without `reencoded` every offset
    is 0.
    """
    lengths = [num_tokens(key) for key in context]
    offsets = accumulate(lengths, initial=0)
    chunk_len = min(CHUNK_LEN, max(64, sum(lengths) // num_programs // 64 * 64))
    rows = [
        (slot + start, min(chunk_len, length - start), start, offset if reencoded else 0)
        for slot, length, offset in zip(map(tier.slot, context), lengths, offsets, strict=False)
        for start in range(0, length, chunk_len)
    ]
    return np.array(rows, np.int32).reshape(-1, 4)


def _round_up(count: int) -> int:
    """Return 1 if `count` is 1, otherwise the smallest power of two that is >= `count` and >= 16."""
    return 1 if count == 1 else max(16, 1 << (count - 1).bit_length())


def _buffer_columns(count: int) -> int:
    """Return the number of columns to allocate for `count` columns, padding for whole tiles included."""
    return (1 << (max(count, 128) - 1).bit_length()) + TILE_PADDING
