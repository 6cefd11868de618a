"""The peak memory of training."""

import resource

import torch


def restart_peak_memory(device: torch.device) -> None:
    """Start to measure: what was allocated before, for example while weights were read, does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def measure_peak_memory(device: torch.device) -> float:
    """Return the largest peak memory of all ranks in GiB; all ranks call it.

    On a GPU it is the memory of tensors since `restart_peak_memory`, on a CPU that of the process since its
    start.
    """
    if device.type == "cuda":
        num_bytes = torch.cuda.max_memory_allocated(device)
    else:
        num_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.tensor(num_bytes, dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    return float(peak) / 2**30
