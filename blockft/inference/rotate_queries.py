"""The query side of a batch of prompts: blocks stay where the device tier holds them, queries turn to each.

Shapes: B prompts, T query tokens, N pieces of a prompt's context, P programs that share it, L layers, S
columns of a final block, K key/value heads, D head size.
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

from blockft.attention.positions import RotaryEmbedding
from blockft.attention.rotate_queries import SLACK, CachedAttention, build_query_rotation
from blockft.inference.block_key import BlockKey, num_tokens
from blockft.inference.cuda_graph import GraphInputs, GraphSize
from blockft.inference.device_tier import DeviceTier, use_device

PIECE_LEN = 512
"""Longer blocks are read in pieces of so many tokens, which programs share evenly."""

MAX_GRAPH_TOKENS = 1024
"""Batches of more query tokens run without a CUDA graph: the GPU is busy long enough to hide the launches."""

MAX_GRAPHS = 24
"""Graphs kept, the least recently used making way; each holds the activations of its shape."""


class CacheInvalidated(Exception):
    """Other prompts have begun since: these begin again, with what was written so far."""


class QueryRotationRunner:
    """Runs a model's final blocks over the blocks of a device tier, on a GPU from CUDA graphs.

    arrived: an event per layer, on a GPU; passes wait for it before they read the layer's part of the cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rotations: Sequence[RotaryEmbedding],
        tier: DeviceTier,
        *,
        use_kernel: bool,
        use_graphs: bool,
        reencoded: bool = True,
        eagerly: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.tier = model, tier
        self.use_kernel, self.use_graphs, self.reencoded = use_kernel, use_graphs, reencoded
        self._eagerly = eagerly
        # external: graphs wait for what is recorded each time, not for what was when they were captured
        on_gpu = model.device.type == "cuda"
        num_events = tier.shape.num_layers if on_gpu else 0
        self.arrived = [torch.cuda.Event(external=True) for _ in range(num_events)]
        for event in self.arrived:
            event.record()
        self.running: RotatedQueriesBatch | None = None
        self._rotations = rotations
        self._finals: WeakValueDictionary[tuple[int, int], torch.Tensor] = WeakValueDictionary()
        self._frames: OrderedDict[GraphSize, GraphInputs] = OrderedDict()
        config = model.config
        self._group = config.num_attention_heads // tier.shape.num_kv_heads

    def prompts(self, contexts: Sequence[Sequence[BlockKey]], num_columns: int) -> "RotatedQueriesBatch":
        """A batch of prompts over blocks that are in the tier, with final blocks of at most `num_columns`."""
        return RotatedQueriesBatch(self, contexts, num_columns)

    def frame(self, size: GraphSize) -> GraphInputs:
        """The inputs of passes of one size, kept with their graph if they run from one."""
        if size in self._frames:
            self._frames.move_to_end(size)
            return self._frames[size]
        frame = GraphInputs(size, self.model.device, self._final(size.prompts, size.columns))
        if self.use_graphs and size.prompts * size.queries <= MAX_GRAPH_TOKENS:
            while len(self._frames) >= MAX_GRAPHS:
                self._frames.popitem(last=False)
            self._frames[size] = frame
        return frame

    def _final(self, num_prompts: int, num_columns: int) -> torch.Tensor:
        """Room for the keys and values of final blocks, shared by frames that live: (L, B, S, 2, K, D).

        Kept graphs hold theirs, up to half of what the device tier takes.
        """
        final = self._finals.get((num_prompts, num_columns))
        if final is None:
            shape = self.tier.shape
            size = (shape.num_layers, num_prompts, *shape.layer_shape(num_columns))
            room = self.tier.cache_LS2KD.nbytes // 2 - num_prompts * num_columns * shape.token_bytes
            while self._frames and sum(other.nbytes for other in self._finals.values()) > room:
                self._frames.popitem(last=False)
            # zeros, as in the device tier
            final = torch.zeros(size, dtype=shape.torch_dtype, device=self.model.device)
            self._finals[num_prompts, num_columns] = final
        return final

    def _wait(self, layer: int) -> None:
        torch.cuda.current_stream().wait_event(self.arrived[layer])

    def width(self, num_prompts: int, num_queries: int) -> int:
        """Columns for the first tokens of final blocks: few different numbers, where a graph is captured."""
        padded = _bucket(num_queries)
        return padded if self.use_graphs and num_prompts * padded <= MAX_GRAPH_TOKENS else num_queries

    def programs(self, num_prompts: int, num_queries: int) -> int:
        """Among how many programs to share each prompt's context."""
        if not self.use_kernel:
            return 1
        from blockft.attention.triton_launch import num_programs

        shape = self.tier.shape
        rows, heads = self._group * num_queries, num_prompts * shape.num_kv_heads
        half = self._rotations[0].inv_freq.numel()
        return num_programs(rows, heads, shape.head_size, half, shape.torch_dtype, self.model.device)

    def run(self, frame: GraphInputs) -> torch.Tensor:
        """One forward pass over a frame's inputs; returns logits (B, num_logits, vocabulary)."""
        if frame.size not in self._frames:
            with self._eagerly():
                return self._forward(frame)
        if frame.graph is None:
            frame.capture(lambda: self._forward(frame))
        assert frame.graph and frame.logits is not None
        frame.graph.replay()
        return frame.logits

    def _forward(self, frame: GraphInputs) -> torch.Tensor:
        kinds = {id(rotation): rotation for rotation in self._rotations}
        turned = {
            kind: build_query_rotation(rotation, frame.context.offsets) for kind, rotation in kinds.items()
        }
        cached = CachedAttention(
            cache_LS2KD=self.tier.cache_LS2KD,
            final_LBS2KD=frame.final_LBS2KD,
            context=frame.context,
            layer_turns=[turned[id(rotation)] for rotation in self._rotations],
            use_kernel=self.use_kernel,
            ready=self._wait if self.arrived else None,
        )
        logits: torch.Tensor = self.model(
            input_ids=frame.ids,
            position_ids=frame.positions,
            cached=cached,
            use_cache=False,
            logits_to_keep=frame.size.logits,
        ).logits
        return logits


class RotatedQueriesBatch:
    """A batch of prompts whose local blocks are in the device tier, ready for final blocks and decoding.

    ::

        columns   0 1 2 3 4 5 6 7
        prompt 0  . . . f f f n n      f final block, n decoded, . padding
        prompt 1  . f f f f f n n
    """

    def __init__(
        self, side: QueryRotationRunner, contexts: Sequence[Sequence[BlockKey]], num_columns: int
    ) -> None:
        self._side, self._num_columns = side, num_columns
        self._contexts = contexts
        self._pieces: list[np.ndarray] = []
        self._context_lens = [sum(map(num_tokens, context)) for context in contexts]
        self._column = 0
        self._first: list[int] = []

    @torch.inference_mode()
    def decode_step(
        self,
        new_ids: Sequence[Sequence[int]],
        num_logits: int = 1,
    ) -> torch.Tensor:
        """Append at least one token to every final block; after the first time, the same number to all.

        Returns the logits after the last `num_logits` columns: (B, num_logits, vocabulary). They are
        overwritten by the next call.

        Raises:
            Overtaken: other prompts have begun since.
        """
        if self._first and self._side.running is not self:
            raise CacheInvalidated
        self._side.running = self
        side, longest = self._side, max(map(len, new_ids))
        width = longest if self._first else side.width(len(new_ids), longest)
        if not self._first:
            self._first = [width - len(ids) for ids in new_ids]
            self._num_columns += width - longest
        programs = side.programs(len(new_ids), width)
        if not self._pieces:
            self._pieces = [
                _pieces(context, side.tier, programs, side.reencoded) for context in self._contexts
            ]
        num_pieces = max(16, _bucket(max(map(len, self._pieces))))
        columns = _columns(self._num_columns)
        with use_device(side.model.device):
            frame = side.frame(GraphSize(len(new_ids), width, columns, num_pieces, num_logits, programs))
            frame.fill(new_ids, self._pieces, self._column, self._first, self._context_lens)
            self._column += width
            self._frame = frame  # holds the final blocks until the next call finds them
            return side.run(frame)


def _pieces(context: Sequence[BlockKey], tier: DeviceTier, programs: int, reencoded: bool) -> np.ndarray:
    """Slot, length, start in its block and offset of every piece of a context: (N, 4) int32.

    A context too short for all programs is cut finer. Blocks that are not re-encoded all stand at 0.
    """
    lengths = [num_tokens(key) for key in context]
    offsets = accumulate(lengths, initial=0)
    piece = min(PIECE_LEN, max(64, sum(lengths) // programs // 64 * 64))
    rows = [
        (slot + start, min(piece, length - start), start, offset if reencoded else 0)
        for slot, length, offset in zip(map(tier.slot, context), lengths, offsets, strict=False)
        for start in range(0, length, piece)
    ]
    return np.array(rows, np.int32).reshape(-1, 4)


def _bucket(count: int) -> int:
    """A number that few different ones are rounded up to: powers of two, from 16 on (1 stays)."""
    return 1 if count == 1 else max(16, 1 << (count - 1).bit_length())


def _columns(count: int) -> int:
    """Columns to make room for, with slack for tiles that are loaded whole."""
    return (1 << (max(count, 128) - 1).bit_length()) + SLACK
