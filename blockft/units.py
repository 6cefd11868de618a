"""Numbers of bytes as people spell them."""

import re

from blockft.errors import UserError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str) -> int:
    """The number of bytes that `10GB`, `512MiB`, `1.5 tb` or `4096` says: GB is 1000^3, GiB is 1024^3.

    Raises:
        UserError: the text says no such number.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found or (found[3] and not found[2]):
        raise UserError(
            f"{text!r} is no size: write a number of bytes, or one with a unit as in 10GB or 512MiB"
        )
    power = _POWERS[found[2].lower()]
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def format_bytes(num_bytes: int) -> str:
    """A size to be read by people, in units of 1000."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
