"""Kill a command just before one of its changes of files, so that each of its states on disk can be tried."""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class KillPoint:
    """Kills the first rank of a command before its change `number`, counted from 1, of files in a folder.

    Without a number nothing is killed. The names of the changes up to there are appended to the file `log`.
    Changes by libraries that are not written in Python are not counted.
    """

    folder: Path
    log: Path
    number: int | None = None

    def __call__(self) -> None:
        """Count from now on, in this process."""
        if os.environ.get("RANK", "0") != "0":
            return
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        process, num_changes = os.getpid(), 0

        def count(event: str, arguments: Sequence[Any]) -> None:
            nonlocal num_changes
            if os.getpid() == process and self._is_change(event, arguments):
                num_changes += 1
                os.write(log, f"{event} {arguments[0]}\n".encode())
                if num_changes == self.number:
                    os.kill(process, signal.SIGKILL)

        sys.addaudithook(count)

    def _is_change(self, event: str, arguments: Sequence[Any]) -> bool:
        if event == "open":
            is_change = isinstance(arguments[2], int) and bool(arguments[2] & _WRITES)
        else:
            is_change = event in _CHANGES
        if not is_change or isinstance(arguments[0], int):
            return False
        path = os.fsdecode(arguments[0])
        # shutil.rmtree names files relative to an open folder
        return Path(path).is_relative_to(self.folder) or (event != "open" and not os.path.isabs(path))
