"""Rank 0's side of the watch over ranks: it learns which ranks live, and tells all which one failed first.

    rank -> rank 0    greeting   hello (rank, host, its ranks, versions)   ready   error   done
    rank 0 -> rank    greeting   ready (all are)   failed (rank, host, reason, exit code)   done

Every message is a line of JSON. Imports only light modules.
"""

import errno
import json
import os
import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from blockft.errors import USER_ERROR, UserError, notify
from blockft.training.package_facts import describe_difference, list_package_facts

PROBE_AFTER_S, PROBE_EVERY_S, NUM_PROBES = 10, 5, 4
"""When the kernel probes a silent connection. A host that does not answer is found after 30 seconds."""

REPORT_AFTER_S = 20
"""Ranks that are waited for longer than this are named on stderr."""

SIBLING_S = 45
"""A rank that has not connected for so long after another rank of its host, which started at the same moment,
has ended. Ranks connect before their slow imports."""

GREETING = b'{"blockft": "watch of ranks"}\n'
"""First line of both sides, by which a rank and rank 0 recognise each other."""

MAX_MESSAGE_BYTES = 1 << 16
"""Longest message. Rank 0 closes a connection that sends a longer line."""


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """The first rank of a run that failed. `node` is the first rank of its host.

    `reason` continues a sentence that begins with the rank. `prints_itself` says that the rank reports its
    own error, `has_ended` that it can report nothing. All ranks end with `exit_code`. See `RankPlace` for
    `noun`.
    """

    rank: int
    host: str
    node: int
    reason: str
    prints_itself: bool = False
    has_ended: bool = False
    exit_code: int = USER_ERROR
    noun: str = "rank"

    def __str__(self) -> str:
        return f"{self.noun} {self.rank} on {self.host} {self.reason}"

    def is_printed_by(self, rank: int, node: int) -> bool:
        """Return whether a rank prints this failure: one of every host that does not know of it."""
        if self.prints_itself and self.node == node:
            return False
        first_alive = node + 1 if self.has_ended and self.rank == node else node
        return rank == first_alive


@dataclass(kw_only=True)
class _Peer:
    """The connection of one rank, as rank 0 sees it."""

    rank: int = -1
    host: str = "?"
    node: int = -1
    received: bytes = b""
    is_ready: bool = False
    is_done: bool = False


class RankRelay:
    """A server on rank 0 that holds one connection to every rank.

    It listens until all ranks are ready; `take_listener` then gives its socket away.

    Args:
        port: port of this host; 0 chooses one.
        num_ranks: number of ranks of the run, this one included.
        deadline: time (of `time.monotonic`) at which all ranks must have connected.
        address: the address at which they connect, for messages.
        noun: what messages call a rank.

    Raises:
        UserError: the port is in use or cannot be used.
    """

    def __init__(self, port: int, *, num_ranks: int, deadline: float, address: str, noun: str) -> None:
        self._listener = _listen(port)
        self.port: int = self._listener.getsockname()[1]
        self._num_ranks, self._deadline, self._address = num_ranks, deadline, address
        self._noun = noun
        self._start, self._is_reported = time.monotonic(), False
        self._facts = list_package_facts()
        self._peers: dict[socket.socket, _Peer] = {}
        self._missing = set(range(num_ranks))
        # missing ranks of which another rank of the same host has connected, and when
        self._siblings: dict[int, tuple[_Peer, float]] = {}
        self._are_connected, self._is_listening, self._is_over = threading.Event(), True, False
        self._failure: RankFailure | None = None
        close_in_children(self._listener)

    def run(self) -> None:
        """Serve the ranks until all have ended; runs in a thread."""
        with self._listener, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while self._peers or not self._is_over:
                self._serve(selector)
                self._check_missing()
                if not self._missing:
                    self._are_connected.set()

    def take_listener(self) -> socket.socket:
        """Return the listening socket, which this object uses no more. Call it when all ranks are ready."""
        return self._listener

    def wait_until_all_connected(self, timeout_s: float) -> None:
        """Wait until all ranks have connected, and so know of a failure."""
        self._are_connected.wait(timeout_s)

    def _serve(self, selector: selectors.BaseSelector) -> None:
        """Accept connections and read messages, for a second at most if none comes."""
        for key, _ in selector.select(timeout=1):
            connection: Any = key.fileobj
            if connection is self._listener:
                connection, _ = self._listener.accept()
                keep_alive(connection)
                close_in_children(connection)
                self._peers[connection] = _Peer()
                selector.register(connection, selectors.EVENT_READ)
                with suppress(OSError):
                    connection.sendall(GREETING)
            elif not self._receive(connection):
                selector.unregister(connection)
                del self._peers[connection]
                connection.close()
        if self._is_listening and sum(peer.is_ready for peer in self._peers.values()) == self._num_ranks:
            # before any rank hears of it: the next connections are those of torch
            self._is_listening = False
            selector.unregister(self._listener)
            self._broadcast({"ready": True})

    def _receive(self, connection: Any) -> bool:
        """Read what a rank has sent; return False when its connection has ended."""
        peer, reason, received = self._peers[connection], describe_end(None), b""
        try:
            received = connection.recv(1 << 16)
        except OSError as error:
            reason = describe_end(error)
        if not received:
            if peer.rank >= 0 and not peer.is_done:
                self._fail(peer, reason, has_ended=True)
            return False
        *lines, peer.received = (peer.received + received).split(b"\n")
        try:
            for line in lines:
                self._handle(peer, connection, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):  # not a rank
            return False
        return len(peer.received) < MAX_MESSAGE_BYTES

    def _handle(self, peer: _Peer, connection: socket.socket, message: dict[str, Any]) -> None:
        if peer.rank < 0:
            if "rank" in message:
                self._welcome(peer, connection, message)
            elif message != json.loads(GREETING):
                raise ValueError("not a rank of a run")
            return
        if "ready" in message:
            peer.is_ready = True
        if "error" in message:
            peer.is_done = True
            self._fail(peer, message["error"], prints_itself=True, exit_code=message["exit_code"])
        if "done" in message:
            peer.is_done = True
            if peer.rank == 0:
                self._is_over = True
                self._broadcast({"done": True})
            else:
                self._send(connection, {"done": True})

    def _welcome(self, peer: _Peer, connection: socket.socket, message: dict[str, Any]) -> None:
        """Handle the first message of a rank: it must belong to this run and have the same versions."""
        twin = next((other for other in self._peers.values() if other.rank == message["rank"]), None)
        peer.rank, peer.host, peer.node = message["rank"], message["host"], message["node"]
        self._missing.discard(peer.rank)
        num_local = message.get("num_local", 1)  # another version of the package may not say it
        for rank in self._missing:
            if peer.node <= rank < peer.node + num_local:
                self._siblings.setdefault(rank, (peer, time.monotonic()))
        if self._failure:
            self._send(connection, {"failed": asdict(self._failure)})
            return
        owner, first = f"{self._noun} {peer.rank} on {peer.host}", f"{self._noun} 0"
        difference = describe_difference(message["facts"], self._facts, owner=owner, reference=first)
        if message["num_ranks"] != self._num_ranks:
            self._fail(
                peer,
                f"belongs to a run of {message['num_ranks']} {self._noun}s, but {first} to one of "
                f"{self._num_ranks}: start the same run on every host",
            )
        elif twin:
            self._fail(
                peer,
                f"was started a second time, first on {twin.host}: start every {self._noun} once "
                "(--node-rank is the place of a host in the hostfile)",
            )
        elif difference:
            self._fail(peer, difference.removeprefix(f"{owner} "))

    def _check_missing(self) -> None:
        """Name the ranks that have not connected: on stderr after a while, as a failure in the end."""
        now = time.monotonic()
        for rank, (sibling, since) in self._siblings.items():
            if rank in self._missing and not self._failure and now - since > SIBLING_S:
                self._missing.discard(rank)  # nobody waits for it any more
                ended = _Peer(rank=rank, host=sibling.host, node=sibling.node)
                reason = f"has not connected, but {self._noun} {sibling.rank} of the same host has: it "
                self._fail(ended, reason + describe_end(None), has_ended=True)
        if self._is_reported and now < self._deadline:
            return
        missing = sorted(self._missing)
        if not missing or self._failure or now - self._start < REPORT_AFTER_S:
            return
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        if not self._is_reported:
            self._is_reported = True
            notify(
                f"{self._noun} 0 waits for {len(missing)} of {self._num_ranks} {self._noun}s at "
                f"{self._address}: {names}"
            )
        if now > self._deadline:
            reason = (
                f"has not connected to {self._address} in time: check that its host has started and can "
                "reach this address (blockft doctor --hostfile FILE)"
            )
            self._fail(_Peer(rank=missing[0], host="its host"), reason)

    def _fail(
        self,
        peer: _Peer,
        reason: str,
        *,
        prints_itself: bool = False,
        has_ended: bool = False,
        exit_code: int = USER_ERROR,
    ) -> None:
        """Tell all ranks of the first failure; later ones follow from it."""
        if self._failure is None:
            self._failure = RankFailure(
                rank=peer.rank,
                host=peer.host,
                node=peer.node,
                reason=reason,
                prints_itself=prints_itself,
                has_ended=has_ended,
                exit_code=exit_code,
                noun=self._noun,
            )
            self._broadcast({"failed": asdict(self._failure)})

    def _broadcast(self, message: dict[str, Any]) -> None:
        # rank 0 comes last: this process may end as soon as it hears the message
        for connection, peer in sorted(self._peers.items(), key=lambda item: item[1].rank, reverse=True):
            if peer.rank >= 0:
                self._send(connection, message)

    def _send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        with suppress(OSError):  # a rank that has ended is found when its connection is read
            connection.sendall(json.dumps(message).encode() + b"\n")


# --- sockets


def describe_end(error: OSError | None) -> str:
    """Return why a rank's connection has ended: without an error, or with that of reading it."""
    if error is None or isinstance(error, ConnectionError):
        return "ended without a message: it was killed, most likely because memory ran out"
    return f"no longer answers ({error.strerror}): its host or the network between the hosts has failed"


def keep_alive(connection: socket.socket) -> None:
    """Make the kernel probe a connection, so that a host that vanished is found."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_AFTER_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_PROBES)
    # data that is not acknowledged turns the probes off
    limit_ms = 1000 * (PROBE_AFTER_S + PROBE_EVERY_S * NUM_PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)


def close_in_children(connection: socket.socket) -> None:
    """Close a socket in forked children: otherwise they would keep it open after this process has ended."""

    def close() -> None:
        descriptor = connection.detach()  # `close` would wait for the files that read the socket
        if descriptor >= 0:
            os.close(descriptor)

    os.register_at_fork(after_in_child=close)


def _listen(port: int) -> socket.socket:
    """Listen at a port, over IPv4 and, where there is IPv6, over both.

    Raises:
        UserError: the port is in use or cannot be used.
    """
    families = [socket.AF_INET6, socket.AF_INET] if socket.has_dualstack_ipv6() else [socket.AF_INET]
    for family in families:
        try:
            return socket.create_server(
                ("", port), family=family, backlog=1024, dualstack_ipv6=family == socket.AF_INET6
            )
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and family != families[-1]:  # IPv6 is turned off
                continue
            reason = (
                "in use by another process"
                if error.errno == errno.EADDRINUSE
                else f"not usable ({os.strerror(error.errno or 0)})"
            )
            raise UserError(
                f"port {port} of the first host is {reason}: choose another port with --master-port "
                "(MASTER_PORT of another launcher)"
            ) from error
    raise AssertionError("a socket of the last family is returned, or its error raised")
