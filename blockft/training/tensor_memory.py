"""Count the bytes of tensors while code runs, on a CPU or on the meta device, where tensors hold no data."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blockft.training.library_internals import storage_id


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside the context create and that still exist.

    Tensors that share a storage count once. `known` are tensors that existed before and do not count.

    live_bytes  bytes that exist now
    peak_bytes  largest value of `live_bytes` since the start or since `reset_peak`
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._seen = {storage_id(tensor.untyped_storage()) for tensor in known}

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage_id(storage)
        if address in self._seen:
            return
        self._seen.add(address)
        num_bytes = storage.nbytes()
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._remove, address, num_bytes).atexit = False

    def _remove(self, address: int, num_bytes: int) -> None:
        self._seen.discard(address)
        self.live_bytes -= num_bytes
