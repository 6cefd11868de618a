"""Reports of the connector to the front end: where the blocks of a request came from, or why it failed.

vLLM passes no such data through a stream, and no reason through an error. A report is a datagram on a Unix
socket of the front end. A request whose report is lost fails, because nothing else says that its blocks were
loaded.
"""

import asyncio
import json
import logging
import os
import socket
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from blockft.serving.block_request import ReplyAddress

_log = logging.getLogger("blockft.serving")

SEND_TIMEOUT_S = 30.0
"""How long a report waits for its reader. Linux keeps 10 datagrams for a socket by default."""

_MAX_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the connector did for a request.

    block    the digest of a block that vLLM computed, which may be used now; "" if blocks were loaded
    sources  the source of each local block of the prompt, in order: a tier
    missing  the indices of blocks that no tier has; the request has failed
    failure  why the request has failed, as a sentence; "" if it has not
    """

    block: str = ""
    sources: Sequence[str] = ()
    missing: Sequence[int] = field(default=())
    failure: str = ""

    @property
    def is_failure(self) -> bool:
        """Whether the request fails."""
        return bool(self.missing or self.failure)


@dataclass(frozen=True)
class ExpectedReports:
    """The first report on a request, and the first one that says that the request fails.

    These differ if one of several workers lacks a block, and if a request loads its blocks again after a
    preemption.
    """

    first: asyncio.Future[Report]
    failed: asyncio.Future[Report]

    def receive(self, report: Report) -> None:
        for future in (self.first, *([self.failed] if report.is_failure else [])):
            if not future.done():
                future.set_result(report)


@dataclass(frozen=True)
class ExpectedBlocks:
    """The reports on blocks that vLLM computes, by their digests."""

    blocks: Mapping[str, asyncio.Future[Report]]

    def receive(self, report: Report) -> None:
        future = self.blocks.get(report.block)
        if future is not None and not future.done():
            future.set_result(report)


class Reporter:
    """Sends reports. Those that the socket of a busy reader does not take wait in a thread."""

    def __init__(self, timeout_s: float = SEND_TIMEOUT_S) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # with `settimeout` Python would try again all the time, which takes a core
        timeout = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1_000_000))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blockft-report")

    def send(self, address: ReplyAddress, report: Report) -> None:
        """Send a report, without waiting. A report that cannot be delivered is logged."""
        # compressed, because a datagram has at most 200 KB, and a prompt may have many blocks
        message = zlib.compress(json.dumps({"id": address.id, **asdict(report)}).encode())
        if not self._deliver(address, message, socket.MSG_DONTWAIT):
            self._thread.submit(self._deliver_later, address, message)

    def close(self) -> None:
        """Deliver the reports that are left, then stop the thread."""
        self._thread.shutdown()
        self._socket.close()

    def _deliver_later(self, address: ReplyAddress, message: bytes) -> None:
        if not self._deliver(address, message):
            _log.warning(f"a report on request {address.id} was not delivered: its reader does not read")

    def _deliver(self, address: ReplyAddress, message: bytes, flags: int = 0) -> bool:
        """Return whether a message was delivered, or cannot be. It was not if its reader is busy."""
        try:
            self._socket.sendto(message, flags, address.socket)
        except BlockingIOError:
            return False
        except OSError as error:
            _log.warning(f"a report on request {address.id} was not delivered: {error.strerror}")
        return True


class ReportReceiver:
    """Receives the reports on the requests of one event loop."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / f"{os.getpid()}-{id(self):x}.sock")
        self._expected: dict[str, ExpectedReports | ExpectedBlocks] = {}
        self._num_requests = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(self.path)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._receive)

    def expect(self) -> tuple[ReplyAddress, ExpectedReports]:
        """Return a new address, and the reports that will arrive there."""
        loop = asyncio.get_running_loop()
        expected = ExpectedReports(loop.create_future(), loop.create_future())
        return self._new_address(expected), expected

    def expect_blocks(self, digests: Iterable[str]) -> tuple[ReplyAddress, ExpectedBlocks]:
        """Return a new address, and the reports on blocks that will arrive there."""
        loop = asyncio.get_running_loop()
        expected = ExpectedBlocks({digest: loop.create_future() for digest in digests})
        return self._new_address(expected), expected

    def forget(self, address: ReplyAddress) -> None:
        """Ignore all later reports to an address."""
        self._expected.pop(address.id, None)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def _receive(self) -> None:
        with suppress(BlockingIOError):
            while True:
                fields = json.loads(zlib.decompress(self._socket.recv(_MAX_BYTES)))
                expected = self._expected.get(fields.pop("id"))
                if expected is None:
                    continue
                expected.receive(Report(**fields))

    def _new_address(self, expected: ExpectedReports | ExpectedBlocks) -> ReplyAddress:
        self._num_requests += 1
        address = ReplyAddress(socket=self.path, id=str(self._num_requests))
        self._expected[address.id] = expected
        return address
