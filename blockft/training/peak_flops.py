"""The peak of cards in dense 16-bit matrix products, against which utilization is measured."""

import re
from typing import Any

import torch

from blockft.errors import notify

_PEAK_TFLOPS = {
    # data sheets of H100, H200, H20 and GH200: half of the figure with sparsity
    "h100": 989.4,
    "h100 pcie": 756.5,
    "h100 nvl": 835.5,
    "h200": 989.4,
    "h200 nvl": 835.5,
    "h800": 989.4,
    "h20": 148.0,
    "gh200": 989.4,
    # data sheets of HGX B200 and GB200 NVL72: half of the figure with sparsity, for one card
    "b200": 2250.0,
    "gb200": 2500.0,
    # data sheets of A100, A800, A40, A30 and A10
    "a100": 312.0,
    "a100 pcie": 312.0,
    "a800": 312.0,
    "a800 pcie": 312.0,
    "a40": 149.7,
    "a30": 165.0,
    "a10": 125.0,
    # data sheets of L40S, L40 and L4
    "l40s": 362.0,
    "l40": 181.0,
    "l4": 121.0,
    # architecture documents of GA102, AD102 and GB202: bfloat16 with accumulation in float32, which GeForce
    # cards compute at half of the rate of workstation cards
    "rtx a6000": 154.8,
    "rtx 3090": 71.0,
    "rtx 6000 ada generation": 364.2,
    "rtx 4090": 165.2,
    "rtx 5090": 209.5,
}
"""Peak in 10^12 operations a second, by the name of the card without vendor, memory and socket."""

_NOT_IN_NAME = re.compile(r"nvidia|geforce|sxm\d?|\d+gb?|hbm\w+")
"""Words of device names that do not change the peak."""


def find_peak_flops(device_name: str) -> float | None:
    """Return the peak of a card in operations a second, or None if the card is not known.

    The name is that of `torch.cuda.get_device_name`. Parts of a card (MIG) and variants for laptops have
    other names than the card, and are not known.
    """
    words = device_name.lower().replace("-", " ").split()
    name = " ".join(word for word in words if not _NOT_IN_NAME.fullmatch(word))
    tflops = _PEAK_TFLOPS.get(name)
    return None if tflops is None else tflops * 1e12


def sum_peak_flops(dtype: torch.dtype) -> float | None:
    """Return the peak of the cards of all ranks in operations a second. All ranks call it.

    On a CPU it is None. In float32 and on cards that are not known it is None as well, and a message says
    that utilization is left out.
    """
    if not torch.cuda.is_available():
        return None
    if dtype.itemsize != 2:
        notify("utilization is left out of the metrics: the peaks of cards are those of 16-bit numbers")
        return None
    name = torch.cuda.get_device_name()
    names: list[Any] = [name]
    if torch.distributed.is_initialized():
        names = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(names, name)
    peaks = {name: find_peak_flops(name) for name in names}
    if unknown := [name for name, peak in peaks.items() if peak is None]:
        notify(
            f"utilization is left out of the metrics: blockft does not know the peak of the card {unknown[0]}"
        )
        return None
    return sum(peaks[name] or 0 for name in names)
