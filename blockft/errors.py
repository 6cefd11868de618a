"""Messages for users on stderr: an error in one sentence, or a warning in one line."""

import os
import sys

from blockft.printable import print_text


class UserError(Exception):
    """A mistake of the user, in one sentence: what is wrong, what was found, what is allowed, the remedy.

    The command line prints it on stderr without a traceback and exits with code 2.
    """


def warn(message: str) -> None:
    """Print a warning on stderr as one line. Of several ranks of a host only the first prints."""
    notify(f"warning: {message}")


def notify(message: str) -> None:
    """Print a remark on stderr as one line. Of several ranks of a host only the first prints."""
    if is_first_of_host():
        print_text(f"blockft: {' '.join(message.split())}", file=sys.stderr)


def is_first_of_host() -> bool:
    """Return whether this process is the first rank of its host, or no rank of a run at all."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
