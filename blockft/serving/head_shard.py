"""The key/value heads of one tensor-parallel worker, and blocks that are put together from all workers."""

from dataclasses import dataclass, replace

import torch

from blockft.inference.block_key import KVShape


@dataclass(frozen=True, kw_only=True)
class HeadShard:
    """The heads that vLLM gives to one of several workers: consecutive ones, or copies of one.

    ::

        4 heads, 2 workers:  0 1 | 2 3          2 heads, 4 workers:  0 | 0 | 1 | 1
    """

    worker: int = 0
    num_workers: int = 1

    def fits(self, num_heads: int) -> bool:
        """Return whether vLLM can split this number of heads."""
        return num_heads % self.num_workers == 0 or self.num_workers % num_heads == 0

    def local_shape(self, shape: KVShape) -> KVShape:
        """Return the shape of what this worker keeps of a token."""
        return replace(shape, num_kv_heads=max(shape.num_kv_heads // self.num_workers, 1))

    def take(self, kv: torch.Tensor) -> torch.Tensor:
        """Return the heads of this worker as a view, from all heads (..., K, D)."""
        num_heads = kv.shape[-2]
        start = num_heads * self.worker // self.num_workers
        return kv.narrow(-2, start, max(num_heads // self.num_workers, 1))

    def join(self, gathered: torch.Tensor, num_heads: int) -> torch.Tensor:
        """Return all heads (..., K, D) from the heads of all workers in order (..., K', D), K' >= K."""
        return gathered[..., :: gathered.shape[-2] // num_heads, :]
