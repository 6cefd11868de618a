"""Values that no setting and no option of their kind can take."""

import os
import socket
from pathlib import Path

DIGITS = "9" * 400

BAD_NUMBERS = {
    "empty": "",
    "text": "ten",
    "not a number": "nan",
    "infinite": "inf",
    "400 digits": DIGITS,
    "minus 400 digits": f"-{DIGITS}",
    "5000 digits": "9" * 5000,
    "infinite exponent": "1e999",
    "two numbers": "1 2",
    "list": "[1]",
    "mapping": "{a: 1}",
    "true": "true",
}
"""Texts that are no number, or a number beyond every bound."""

BAD_INTEGERS = BAD_NUMBERS | {"fraction": "1.5", "exponent": "1e3", "hexadecimal": "0x10"}
"""Texts that are no whole number, or a number beyond every bound."""

BAD_TEXTS = {
    "undecodable bytes": os.fsdecode(b"a\xffb"),
    "lone surrogate": "a\ud800b",
    "NUL": "a\0b",
}
"""Texts that cannot be written to a file in UTF-8."""

BAD_PATHS = BAD_TEXTS | {
    "empty": "",
    "blank": "  ",
    "home": "~/data",
    "long name": "n" * 256,
    "long name of a parent": f"{'ü' * 128}/file",
    "long path": "d/" * 2100,
    "a megabyte": "p" * 1_000_000,
}
"""Texts that no file can have as its path."""


def make_unreadable(folder: Path) -> dict[str, str]:
    """Make things that are no file and no folder, and return their paths by what they are."""
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "empty file").touch()
    (folder / "binary file").write_bytes(bytes(range(256)) * 4)
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        # a socket's address has at most 107 bytes
        here = Path.cwd()
        os.chdir(folder)
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
    found = {
        name: str(folder / name)
        for name in ("loop", "dangling", "empty file", "binary file", "pipe", "socket")
    }
    return found | {
        "missing": str(folder / "no" / "such"),
        "below a file": str(folder / "empty file" / "below"),
        "below a loop": str(folder / "loop" / "below"),
        "endless device": "/dev/zero",
        "empty device": "/dev/null",
        "root": "/",
        "device folder": "/dev",
    }
