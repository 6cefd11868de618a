"""The inputs of the query side's forward passes, and the CUDA graphs that read them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from blockft.attention.rotate_queries import CachedContext


@dataclass(frozen=True)
class GraphSize:
    """What a graph is captured for; columns are those of a final block, pieces those of a context."""

    prompts: int
    queries: int
    columns: int
    pieces: int
    logits: int
    programs: int


@dataclass
class GraphInputs:
    """The inputs of forward passes of one size: one int32 tensor, filled with one copy."""

    size: GraphSize
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
        self._copied = torch.cuda.Event() if self.device.type == "cuda" else None
        self._host = {name: part.numpy() for name, part in self._views(self._staged).items()}
        modes = self._views(self._held)
        self.ids, self.positions = modes.pop("ids"), modes.pop("positions")
        self.context = CachedContext(**modes)

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
        if self._copied:
            self._copied.synchronize()
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
            host["shares"][b] = _program_bounds(
                pieces[b][:, 1], self.size.programs, column + width - first[b]
            )
        host["column"][0] = column
        self._held.copy_(self._staged, non_blocking=True)
        if self._copied:
            self._copied.record()

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
        modes, start = {}, 0
        for name, shape in self._parts.items():
            end = start + int(np.prod(shape))
            modes[name] = flat[start:end].view(shape)
            start = end
        return modes


def _program_bounds(lengths: np.ndarray, num_programs: int, final_len: int) -> np.ndarray:
    """Where each program's pieces begin, and the last one's end, for about as many tokens each.

    The last program reads the final block, too.
    """
    ends = np.cumsum(lengths)
    total = final_len + (ends[-1] if len(ends) else 0)
    targets = total * np.arange(1, num_programs) / num_programs
    # a piece goes to the program in whose part its middle lies
    inner = np.searchsorted(ends - lengths / 2, targets)
    return np.concatenate(([0], inner, [len(lengths)])).astype(np.int32)
