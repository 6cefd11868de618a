"""Estimate how many samples `prepare` encodes: the sizes of files are known, the number of samples is not."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(kw_only=True)
class CopyProgress:
    """How far the reading of one copy of a source is.

    num_bytes: the size of its files; 0 if it has none.
    max_samples: the largest number of its records; None if there is no limit.
    num_earlier: the number of its first samples that an earlier run has encoded.
    num_samples: the number of its samples so far, without those.
    num_bytes_read: how much of its files all of them took.
    """

    num_bytes: int
    max_samples: int | None
    num_earlier: int = 0
    num_samples: int = 0
    num_bytes_read: int = 0
    is_finished: bool = False


def estimate_samples(copies: Sequence[CopyProgress]) -> int | None:
    """Return the number of samples of all copies once they are read; None if it cannot be estimated.

    The rest of a copy has as many samples per byte as its beginning. A copy that is not begun has as many as
    all copies so far.
    """
    num_samples = sum(copy.num_earlier + copy.num_samples for copy in copies if copy.num_bytes_read)
    num_bytes = sum(copy.num_bytes_read for copy in copies)
    total = 0.0
    for copy in copies:
        if copy.is_finished:
            total += copy.num_samples
            continue
        if copy.num_bytes_read:
            num_read = copy.num_earlier + copy.num_samples
            rest = (copy.num_bytes - copy.num_bytes_read) * num_read / copy.num_bytes_read
        elif copy.num_bytes and num_bytes:
            rest = copy.num_bytes * num_samples / num_bytes
        elif copy.max_samples is not None:
            rest = copy.max_samples - copy.num_earlier - copy.num_samples
        else:
            return None
        if copy.max_samples is not None:
            rest = min(rest, copy.max_samples - copy.num_earlier - copy.num_samples)
        total += copy.num_samples + max(0.0, rest)  # a record may give more samples than one
    return round(total)
