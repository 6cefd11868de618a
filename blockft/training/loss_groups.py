"""Losses by mode and by source: sums on the device until they are logged.

Shapes: N labels of a row, G groups. A group is a source and a mode: group 2 * source is a source in block
mode, group 2 * source + 1 is the same source in full mode.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from blockft.data.encoder import IGNORE_INDEX

MODES = ("block", "full")
"""The modes in the order of the groups of a source."""


def find_groups(sources: NDArray[np.int64], is_block: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the group of each example, given its source and its mode."""
    return 2 * sources + ~is_block


class LossGroups:
    """Sums the losses of labels by group.

    Nothing waits for the device until `take` or `gather`, which all ranks call. The sums are in float64, so
    that the means do not depend on the order of the rows.
    """

    def __init__(self, num_sources: int, device: torch.device) -> None:
        self._sums_G2 = torch.zeros(2 * num_sources, 2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, groups_N: torch.Tensor, losses_N: torch.Tensor, labels_N: torch.Tensor) -> None:
        """Add the losses of a row; positions with the label `IGNORE_INDEX` do not count."""
        is_label_N = labels_N != IGNORE_INDEX
        added_N2 = torch.stack([losses_N.double() * is_label_N, is_label_N.double()], dim=1)
        self._sums_G2.index_add_(0, groups_N, added_N2)

    def take(self, prefix: str = "loss_") -> dict[str, float]:
        """Return the mean loss per label token over all ranks, and start again.

        The names are `prefix` with `block`, `full`, `source_0`, `source_1`, ... A mode or source without
        labels is left out.
        """
        sums_G2 = self._sums_G2.clone()
        self._sums_G2.zero_()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums_G2)
        sums = sums_G2.cpu().view(-1, len(MODES), 2)
        names = [*MODES, *(f"source_{index}" for index in range(len(sums)))]
        totals = torch.cat([sums.sum(dim=0), sums.sum(dim=1)]).tolist()
        return {
            f"{prefix}{name}": loss / num_labels
            for name, (loss, num_labels) in zip(names, totals, strict=True)
            if num_labels
        }

    def gather(self) -> list[list[list[float]]]:
        """Return the sums of every rank, without starting again: for each group its losses and its labels."""
        if not torch.distributed.is_initialized():
            return [self._sums_G2.tolist()]
        by_rank = [torch.empty_like(self._sums_G2) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(by_rank, self._sums_G2)
        return [sums_G2.tolist() for sums_G2 in by_rank]

    def restore(self, by_rank: Sequence[Sequence[Sequence[float]]], rank: int, num_ranks: int) -> None:
        """Continue with the sums that `gather` gave before an interruption.

        With the same number of ranks each rank continues with its own sums, exact to the last bit. Otherwise
        the first rank continues with all of them.
        """
        sums = torch.tensor(by_rank, dtype=torch.float64)
        if len(by_rank) == num_ranks:
            self._sums_G2.copy_(sums[rank])
        elif rank == 0:
            self._sums_G2.copy_(sums.sum(dim=0))
