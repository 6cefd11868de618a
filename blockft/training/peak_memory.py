"""The peak memory of training."""

import os
import resource
from dataclasses import dataclass

import torch


def restart_peak_memory(device: torch.device) -> None:
    """Start to measure: what was allocated before, for example while weights were read, does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables with the options of PyTorch's allocator."""


def use_expandable_segments() -> None:
    """Let PyTorch's allocator extend its memory on a GPU, unless the user has set other options of it.

    Otherwise it reserves blocks of fixed sizes and keeps them for later tensors that fit, so that it may
    reserve much more than tensors need. Call it before the first tensor on a GPU; later it has no effect.
    """
    if not any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


@dataclass(frozen=True)
class PeakMemory:
    """The largest memory of all ranks in GiB.

    tensors_gib   on a GPU that of tensors since `restart_peak_memory`; on a CPU that of the process
    reserved_gib  what PyTorch reserved for tensors on a GPU, as other programs see it; None on a CPU
    """

    tensors_gib: float
    reserved_gib: float | None


def measure_peak_memory(device: torch.device) -> PeakMemory:
    """Return the peak memory; all ranks call it."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        sizes = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]
    else:
        sizes = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 0]
    peaks = torch.tensor(sizes, dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(peaks, torch.distributed.ReduceOp.MAX)
    tensors, reserved = (peaks / 2**30).tolist()
    return PeakMemory(tensors, reserved if is_cuda else None)
