"""Let the blocks of a prompt that are computed together enter one step of the engine.

The front end sends them as the prompts of one request, which reach the scheduler one after the other. An idle
engine would start a step with the first one, and the others would wait for its end.
"""

import time
from dataclasses import dataclass

from blockft.serving.block_request import EncodeRequest, ReplyAddress

ARRIVAL_S = 0.01
"""How long blocks wait for the next one of their set. It may never arrive, for example if a client leaves."""


@dataclass
class _Arriving:
    """A set of which blocks have not arrived. until: when the others go on without them."""

    num_missing: int
    until: float


class BlockSets:
    """The sets of blocks that are arriving. The blocks of a set have one address for reports."""

    def __init__(self) -> None:
        self._arriving: dict[ReplyAddress, _Arriving] = {}

    def add(self, request: EncodeRequest) -> None:
        """Record that a block has arrived."""
        arriving = self._arriving.setdefault(request.reply_to, _Arriving(request.num_blocks, 0))
        arriving.num_missing -= 1
        arriving.until = time.monotonic() + ARRIVAL_S
        if not arriving.num_missing:
            del self._arriving[request.reply_to]

    def is_arriving(self, request: EncodeRequest) -> bool:
        """Return whether a block waits for others of its set."""
        arriving = self._arriving.get(request.reply_to)
        return arriving is not None and time.monotonic() < arriving.until

    def finish(self, request: EncodeRequest) -> None:
        """Forget the set of a block that has ended. The others of the set go on."""
        self._arriving.pop(request.reply_to, None)
