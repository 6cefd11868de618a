"""The inputs of forward passes that rotate queries, and the CUDA graphs that read them."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from blockft.attention.cached_context import CachedContext


@dataclass(frozen=True, kw_only=True)
class GraphSize:
    """The sizes that a graph is captured for.

    num_columns   columns of the final blocks' buffer
    num_chunks    chunks of a prompt's context
    num_logits    last columns whose logits are computed
    num_programs  Triton programs that share a prompt's context
    """

    num_prompts: int
    num_queries: int
    num_columns: int
    num_chunks: int
    num_logits: int
    num_programs: int


class GraphInputs:
    """The inputs of forward passes of one size, in one int32 tensor that is filled with one copy.

    ids, positions  (B, T) views of the device's tensor
    context         the cached blocks that each prompt reads, views of it too
    final_LBS2KD    the keys and values of the final blocks
    graph, logits   the captured pass and its output; None before `capture`
    """

    def __init__(self, size: GraphSize, device: torch.device, final_LBS2KD: torch.Tensor) -> None:
        self.size, self.final_LBS2KD = size, final_LBS2KD
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: torch.Tensor | None = None
        is_cuda = device.type == "cuda"
        num_values = sum(int(np.prod(shape)) for shape in self._shapes().values())
        self._host_buffer = torch.zeros(num_values, dtype=torch.int32, pin_memory=is_cuda)
        self._device_buffer = self._host_buffer.to(device)
        self._copied = torch.cuda.Event() if is_cuda else None
        self._host = {name: view.numpy() for name, view in self._views(self._host_buffer).items()}
        views = self._views(self._device_buffer)
        self.ids, self.positions = views.pop("ids"), views.pop("positions")
        self.context = CachedContext(**views)

    def fill(
        self,
        new_ids: Sequence[Sequence[int]],
        chunks: Sequence[np.ndarray],
        query_start: int,
        pad_lens: Sequence[int],
        context_lens: Sequence[int],
    ) -> None:
        """Write the inputs of a pass. `chunks` are (N, 4) int32 each: slot, length, start, offset."""
        host, num_queries = self._host, self.size.num_queries
        if self._copied:
            self._copied.synchronize()
        for b, ids in enumerate(new_ids):
            host["ids"][b, : num_queries - len(ids)] = 0
            host["ids"][b, num_queries - len(ids) :] = ids
            shift = context_lens[b] - pad_lens[b]
            positions = np.arange(query_start + shift, query_start + shift + num_queries)
            host["positions"][b] = np.maximum(positions, 0)
            host["pad_lens"][b], host["position_shifts"][b] = pad_lens[b], shift
            num_chunks = len(chunks[b])
            for i, name in enumerate(("slots", "lengths", "starts", "offsets")):
                host[name][b, :num_chunks] = chunks[b][:, i]
                host[name][b, num_chunks:] = 0
            final_len = query_start + num_queries - pad_lens[b]
            host["program_bounds"][b] = _program_bounds(chunks[b][:, 1], self.size.num_programs, final_len)
        host["query_start"][0] = query_start
        self._device_buffer.copy_(self._host_buffer, non_blocking=True)
        if self._copied:
            self._copied.record()

    def capture(self, forward: Callable[[], torch.Tensor]) -> None:
        """Record the kernels of a pass; see `capture_graph`."""
        self.graph, self.logits = capture_graph(forward)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        b, t, n = self.size.num_prompts, self.size.num_queries, self.size.num_chunks
        return {
            "ids": (b, t),
            "positions": (b, t),
            "slots": (b, n),
            "lengths": (b, n),
            "starts": (b, n),
            "offsets": (b, n),
            "program_bounds": (b, self.size.num_programs + 1),
            "query_start": (1,),
            "pad_lens": (b,),
            "position_shifts": (b,),
        }

    def _views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the inputs by name, as views of a one-dimensional buffer."""
        views, start = {}, 0
        for name, shape in self._shapes().items():
            end = start + int(np.prod(shape))
            views[name] = buffer[start:end].view(shape)
            start = end
        return views


def capture_graph(forward: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Record the kernels of a pass, after two runs that compile and allocate everything.

    Returns the graph, and the pass's result, which every replay overwrites.
    """
    # PyTorch's own stream for captures belongs to the first GPU that captured in this process
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # calls of other threads, such as allocations, do not end the capture
    with (
        _no_garbage_collection(),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        result = forward()
    return graph, result


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect no garbage inside: another graph that is destroyed during a capture would end the capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _program_bounds(lengths: np.ndarray, num_programs: int, final_len: int) -> np.ndarray:
    """Return the first chunk of each program, and the number of chunks: (P + 1,) int32.

    Programs get about the same number of tokens. The last program also reads the final block.
    """
    ends = np.cumsum(lengths)
    total = final_len + (ends[-1] if len(ends) else 0)
    targets = total * np.arange(1, num_programs) / num_programs
    # a chunk goes to the program whose tokens include the chunk's middle
    inner = np.searchsorted(ends - lengths / 2, targets)
    return np.concatenate(([0], inner, [len(lengths)])).astype(np.int32)
