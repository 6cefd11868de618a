"""Sizes, durations and counts as people write them, such as 10GB, 7d or "1 row"."""

import re

from blockft.errors import UserError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?", re.IGNORECASE | re.ASCII)

MAX_BYTES = 1 << 60
"""Largest size that is accepted."""

MAX_SECONDS = 100 * 365 * 86400
"""Longest duration that is accepted."""

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])", re.ASCII)


def parse_bytes(text: str) -> int:
    """Return the number of bytes of a size such as "10GB", "512MiB", "1.5 tb" or "4096".

    GB is 1000^3 bytes, GiB is 1024^3.

    Raises:
        UserError: the text is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match or (match[3] and not match[2]):
        raise UserError(
            f"{text[:40]!r} is not a size: write a number of bytes, or a number with a unit such as 10GB "
            "or 512MiB"
        )
    power = _POWERS[match[2].lower()]
    size = float(match[1]) * (1024 if match[3] else 1000) ** power
    if size > MAX_BYTES:
        raise UserError(f"{text[:40]!r} is more than {MAX_BYTES} bytes: write a smaller size")
    return int(size)


def format_bytes(num_bytes: int) -> str:
    """Format a number of bytes in units of 1000, such as "1.5 GB"."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def format_memory(num_bytes: float) -> str:
    """Format the size of memory in units of 1024, such as "1.5 GiB"."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1023.5:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def format_count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as "1 row" or "1,200 rows"; the default plural ends in s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as "30m", "12h" or "7d".

    Raises:
        UserError: the text is not a duration.
    """
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise UserError(
            f"{text[:40]!r} is not a duration: write a number with a unit, such as 30m, 12h or 7d"
        )
    seconds = float(match[1]) * _UNIT_SECONDS[match[2]]
    if seconds > MAX_SECONDS:
        raise UserError(f"{text[:40]!r} is more than 100 years: write a shorter duration")
    return seconds
