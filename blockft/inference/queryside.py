"""The query side of a batch of prompts: blocks stay where the device tier holds them, queries turn to each.

Shapes: B prompts, T query tokens, N pieces of a prompt's context, P programs that share it, L layers, S columns
of a final block, K key/value heads, D head size.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from weakref import WeakValueDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from blockft.attention.positions import Rotation
from blockft.attention.queryside import CachedAttention, CachedContext, turns
from blockft.inference.block import Key, num_tokens
from blockft.inference.device import DeviceTier

PIECE = 512
"""Longer blocks are read in pieces of so many tokens, which programs share evenly."""

GRAPH_TOKENS = 1024
"""Batches of more query tokens run without a CUDA graph: the GPU is busy long enough to hide the launches."""

GRAPHS = 24
"""Graphs kept, the least recently used making way; each holds the activations of its shape."""


@dataclass(frozen=True)
class Size:
    """What a graph is captured for: prompts, query tokens, columns of a final block, pieces, logits, programs."""

    prompts: int
    queries: int
    columns: int
    pieces: int
    logits: int
    programs: int


class QuerySide:
    """Runs a model's final blocks over the blocks of a device tier, on a GPU from CUDA graphs."""

    def __init__(
        self,
        model: PreTrainedModel,
        rotations: Sequence[Rotation],
        tier: DeviceTier,
        *,
        use_kernel: bool,
        use_graphs: bool,
    ) -> None:
        self.model, self.tier = model, tier
        self.use_kernel, self.use_graphs = use_kernel, use_graphs
        self._rotations = rotations
        self._finals: WeakValueDictionary[tuple[int, int], torch.Tensor] = WeakValueDictionary()
        self._frames: OrderedDict[Size, _Frame] = OrderedDict()
        config = model.config
        self._group = config.num_attention_heads // tier.shape.num_kv_heads

    def prompts(self, contexts: Sequence[Sequence[Key]], num_columns: int) -> "CachedPrompts":
        """A batch of prompts over blocks that are in the tier, with final blocks of at most `num_columns`."""
        return CachedPrompts(self, contexts, num_columns)

    def frame(self, size: Size) -> "_Frame":
        """The inputs of passes of one size, kept with their graph if they run from one."""
        if size in self._frames:
            self._frames.move_to_end(size)
            return self._frames[size]
        frame = _Frame(size, self.model.device, self._final(size.prompts, size.columns))
        if self.use_graphs and size.prompts * size.queries <= GRAPH_TOKENS:
            while len(self._frames) >= GRAPHS:
                self._frames.popitem(last=False)
            self._frames[size] = frame
        return frame

    def _final(self, num_prompts: int, num_columns: int) -> torch.Tensor:
        """Room for the keys and values of final blocks, shared by frames that live: (L, B, S, 2, K, D)."""
        final = self._finals.get((num_prompts, num_columns))
        if final is None:
            shape = self.tier.shape
            size = (shape.num_layers, num_prompts, num_columns, 2, shape.num_kv_heads, shape.head_size)
            # zeros, as in the device tier
            final = torch.zeros(size, dtype=shape.dtype, device=self.model.device)
            self._finals[num_prompts, num_columns] = final
        return final

    def programs(self, num_prompts: int, num_queries: int) -> int:
        """Among how many programs to share each prompt's context."""
        if not self.use_kernel:
            return 1
        from blockft.attention.kernel import num_programs

        heads = num_prompts * self.tier.shape.num_kv_heads
        return num_programs(self._group * num_queries, heads, self.model.device)

    def run(self, frame: "_Frame", ready: Callable[[int], None] | None) -> torch.Tensor:
        """One forward pass over a frame's inputs; returns logits (B, num_logits, vocabulary).

        With `ready`, called before each layer's part of the cache is read, it runs without a graph.
        """
        if ready or frame.size not in self._frames:
            return self._forward(frame, ready)
        if frame.graph is None:
            frame.capture(lambda: self._forward(frame, None))
        assert frame.graph and frame.logits is not None
        frame.graph.replay()
        return frame.logits

    def _forward(self, frame: "_Frame", ready: Callable[[int], None] | None) -> torch.Tensor:
        kinds = {id(rotation): rotation for rotation in self._rotations}
        turned = {kind: turns(rotation, frame.context.offsets) for kind, rotation in kinds.items()}
        cached = CachedAttention(
            cache_LS2KD=self.tier.cache_LS2KD,
            final_LBS2KD=frame.final_LBS2KD,
            context=frame.context,
            layer_turns=[turned[id(rotation)] for rotation in self._rotations],
            use_kernel=self.use_kernel,
            ready=ready,
        )
        logits: torch.Tensor = self.model(
            input_ids=frame.ids,
            position_ids=frame.positions,
            cached=cached,
            use_cache=False,
            logits_to_keep=frame.size.logits,
        ).logits
        return logits


class CachedPrompts:
    """A batch of prompts whose local blocks are in the device tier, ready for final blocks and decoding.

    ::

        columns   0 1 2 3 4 5 6 7
        prompt 0  . . . f f f n n      f final block, n decoded, . padding
        prompt 1  . f f f f f n n
    """

    def __init__(self, side: QuerySide, contexts: Sequence[Sequence[Key]], num_columns: int) -> None:
        self._side, self._num_columns = side, num_columns
        self._pieces = [_pieces(context, side.tier) for context in contexts]
        self._context_lens = [sum(map(num_tokens, context)) for context in contexts]
        self._column = 0
        self._first: list[int] = []

    @torch.inference_mode()
    def advance(
        self,
        new_ids: Sequence[Sequence[int]],
        num_logits: int = 1,
        ready: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Append at least one token to every final block; after the first time, the same number to all.

        Returns the logits after the last `num_logits` columns: (B, num_logits, vocabulary). They are
        overwritten by the next call. `ready`: see `QuerySide.run`.
        """
        side, longest = self._side, max(map(len, new_ids))
        width = _bucket(longest) if side.use_graphs and not self._first else longest
        self._first = self._first or [width - len(ids) for ids in new_ids]
        num_pieces = max(16, _bucket(max(map(len, self._pieces))))
        columns = _columns(self._num_columns)
        frame = side.frame(
            Size(len(new_ids), width, columns, num_pieces, num_logits, side.programs(len(new_ids), width))
        )
        frame.fill(new_ids, self._pieces, self._column, self._first, self._context_lens)
        self._column += width
        self._frame = frame  # holds the final blocks until the next call finds them
        return side.run(frame, ready)


@dataclass
class _Frame:
    """The inputs of forward passes of one size: one int32 tensor, filled with one copy."""

    size: Size
    device: torch.device
    final_LBS2KD: torch.Tensor
    graph: torch.cuda.CUDAGraph | None = None
    logits: torch.Tensor | None = None
    _parts: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        b, n = self.size.prompts, self.size.pieces
        self._parts = {
            "ids": (b, self.size.queries),
            "positions": (b, self.size.queries),
            "slots": (b, n),
            "lengths": (b, n),
            "starts": (b, n),
            "offsets": (b, n),
            "shares": (b, self.size.programs + 1),
            "column": (1,),
            "first": (b,),
            "shift": (b,),
        }
        total = sum(int(np.prod(shape)) for shape in self._parts.values())
        self._staged = torch.zeros(total, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self._held = self._staged.to(self.device)
        self._host = {name: part.numpy() for name, part in self._views(self._staged).items()}
        views = self._views(self._held)
        self.ids, self.positions = views.pop("ids"), views.pop("positions")
        self.context = CachedContext(**views)

    def fill(
        self,
        new_ids: Sequence[Sequence[int]],
        pieces: Sequence[np.ndarray],
        column: int,
        first: Sequence[int],
        context_lens: Sequence[int],
    ) -> None:
        """Write the inputs of a pass; `pieces` are (N, 4) int32 each: slot, length, start, offset."""
        host, width = self._host, self.size.queries
        for b, ids in enumerate(new_ids):
            host["ids"][b, : width - len(ids)] = 0
            host["ids"][b, width - len(ids) :] = ids
            shift = context_lens[b] - first[b]
            place = np.arange(column + shift, column + shift + width)
            host["positions"][b] = np.maximum(place, 0)
            host["first"][b], host["shift"][b] = first[b], shift
            num_pieces = len(pieces[b])
            for i, name in enumerate(("slots", "lengths", "starts", "offsets")):
                host[name][b, :num_pieces] = pieces[b][:, i]
                host[name][b, num_pieces:] = 0
            host["shares"][b] = _shares(pieces[b][:, 1], self.size.programs)
        host["column"][0] = column
        self._held.copy_(self._staged, non_blocking=True)

    def capture(self, forward: Callable[[], torch.Tensor]) -> None:
        """Record the kernels of a pass, after running it so that everything is compiled and allocated."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = forward()
        self.graph = graph

    def _views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        views, start = {}, 0
        for name, shape in self._parts.items():
            end = start + int(np.prod(shape))
            views[name] = flat[start:end].view(shape)
            start = end
        return views


def _pieces(context: Sequence[Key], tier: DeviceTier) -> np.ndarray:
    """Slot, length, start in its block and offset of every piece of a context: (N, 4) int32."""
    lengths = [num_tokens(key) for key in context]
    offsets = accumulate(lengths, initial=0)
    rows = [
        (slot + start, min(PIECE, length - start), start, offset)
        for slot, length, offset in zip(map(tier.slot, context), lengths, offsets, strict=False)
        for start in range(0, length, PIECE)
    ]
    return np.array(rows, np.int32).reshape(-1, 4)


def _shares(lengths: np.ndarray, num_programs: int) -> np.ndarray:
    """Where each program's pieces begin, and the last one's end, for about as many tokens each."""
    ends = np.cumsum(lengths)
    total = ends[-1] if len(ends) else 0
    targets = total * np.arange(1, num_programs) / num_programs
    # a piece goes to the program in whose part its middle lies
    inner = np.searchsorted(ends - lengths / 2, targets)
    return np.concatenate(([0], inner, [len(lengths)])).astype(np.int32)


def _bucket(count: int) -> int:
    """A number that few different ones are rounded up to: powers of two, from 16 on (1 stays)."""
    return 1 if count == 1 else max(16, 1 << (count - 1).bit_length())


def _columns(count: int) -> int:
    """Columns to make room for, with slack for tiles that are loaded whole."""
    return (1 << (max(count, 128) - 1).bit_length()) + 128
