"""Watch the ranks of a run: when one rank ends before its time, all others end within seconds and name it.

Without a watch the other ranks wait in a collective until its time limit, which must be long: saving, an
evaluation or the first compilation may take many minutes. The watch sees only whether processes live. Rank 0
listens on a port, every rank holds one connection to it, and the kernel closes the connection of a process
that ends. Probes of the kernel find a host that no longer answers. A process that is slow or stopped is not
taken for a failed one, because its kernel answers.

    rank -> rank 0    hello (rank, host, versions)   ready   error   done
    rank 0 -> rank    ready (all are)   failed (rank, host, reason)   done

The port of rank 0 is found through torch's store at MASTER_ADDR:MASTER_PORT, so that every launcher will do.
"""

import atexit
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist

from blockft.errors import RankError, ReportedError, UserError, first_line, is_first_of_host, notify
from blockft.printable import print_text
from blockft.training.package_facts import describe_difference, list_package_facts

PROBE_AFTER_S, PROBE_EVERY_S, NUM_PROBES = 10, 5, 4
"""When the kernel probes a silent connection. A host that does not answer is found after 30 seconds."""

CONNECT_S = 10
"""Longest wait for the answer to one attempt to connect."""

REPORT_AFTER_S = 20
"""Ranks that are waited for longer than this are named on stderr."""

GRACE_S = 1.0
"""Time in which a failed rank prints its own error, before the others print theirs and end."""

REPLY_S = 5.0
"""Longest wait of a rank that has failed until rank 0 says which rank failed first."""

CONNECT_AT_EXIT_S, CONNECT_BEFORE_ERROR_S = 30, 3
"""Longest wait of a rank that fails before it is connected: at its end, if it is on another host than rank 0,
and before it prints its error."""

EXIT_CODE = 2
"""Exit code of a rank that ends because another one failed."""

_LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Texts of the errors of Gloo when a rank has ended."""

_num_watches = count()


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """The first rank of a run that failed. `node` is the first rank of its host.

    `reason` continues a sentence that begins with the rank. `prints_itself` says that the rank reports its
    own error, `has_ended` that it can report nothing.
    """

    rank: int
    host: str
    node: int
    reason: str
    prints_itself: bool = False
    has_ended: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} {self.reason}"

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


class RankWatch:
    """This rank's part of the watch. All ranks make one at the start of a run.

    Use `watching` around everything that the ranks do together. Outside of the main thread nothing is raised:
    a rank that is waiting in a collective when another one fails is ended with EXIT_CODE.

    Raises:
        UserError: the port of rank 0 is in use.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._rank, self._num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._node = self._rank - int(os.environ["LOCAL_RANK"])
        self._address, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._deadline = time.monotonic() + timeout_s
        self._connection: socket.socket | None = None
        self._failure: RankFailure | None = None
        self._connect_error: UserError | None = None
        self._is_done, self._is_reporting = False, False
        self._has_failed, self._is_connected = threading.Event(), threading.Event()
        self._all_ready, self._is_finished = threading.Event(), threading.Event()
        self._ending = threading.Lock()
        # torchrun starts the ranks again in the same store
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._key = f"blockft/watch/{attempt}/{next(_num_watches)}"
        self._store: Any = None
        if self._rank == 0:
            relay = _Relay(self._num_ranks, self._deadline, f"{self._address}:{self._port}")
            self._store = self._open_store(timeout_s)
            self._store.set(self._key, f"{relay.port} {relay.token}")
            threading.Thread(target=relay.run, daemon=True, name="rank watch relay").start()
        threading.Thread(target=self._listen, daemon=True, name="rank watch").start()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Tell the other ranks when this one fails inside, and turn a lost connection into a message.

        Raises:
            UserError: another rank has failed. Of several ranks of a host one prints it.
        """
        try:
            yield
        except BaseException as error:
            with self._ending:  # from here on the watching thread does not end this process
                raised = self._report(error)
            if raised is error:
                raise
            raise raised from error
        self.finish()

    def finish(self) -> None:
        """Say that this rank has done its work; call it when no other rank waits for this one any more."""
        if not self._is_done:
            self._is_done = True
            if self._send({"done": True}):
                self._is_finished.wait(REPLY_S)

    def wait_until_ready(self) -> None:
        """Wait until every rank of the run calls this function.

        Raises:
            UserError: this rank cannot reach the first host, or a rank does not connect in time.
        """
        self._is_connected.wait()
        if self._connect_error:
            raise self._connect_error
        self._send({"ready": True})
        while not self._all_ready.wait(0.2):
            if self._has_failed.is_set():
                raise _LostRank("another rank has failed")

    @contextmanager
    def time_limit(self, seconds: float, message: str) -> Iterator[None]:
        """End this process with a message if what happens inside takes longer, also if it is stuck."""

        def end() -> None:
            with self._ending:
                _print_and_exit(message if is_first_of_host() else "")

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    # --- the connection to rank 0

    def _open_store(self, timeout_s: float) -> Any:
        """Return torch's store; rank 0 serves it, except under torchrun, whose agent does."""
        is_server = self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            return dist.TCPStore(  # type: ignore[attr-defined]
                self._address,
                self._port,
                world_size=self._num_ranks,
                is_master=is_server,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistError as error:
            if "EADDRINUSE" in str(error) or "address already in use" in str(error):
                raise UserError(
                    f"port {self._port} of the first host is in use by another process: choose another port "
                    "with --master-port (MASTER_PORT of another launcher)"
                ) from error
            raise

    def _find_relay(self) -> tuple[int, str]:
        """Return port and token of rank 0, which may start later than this rank.

        Raises:
            UserError: rank 0 cannot be reached in time.
        """
        start, is_reported = time.monotonic(), False
        while True:
            try:
                # the client of the store prints a stack trace if it cannot connect
                socket.create_connection((self._address, self._port), timeout=CONNECT_S).close()
                store = self._store or self._open_store(CONNECT_S)
                port, token = store.get(self._key).decode().split()
                return int(port), token
            except (OSError, RuntimeError, ValueError) as error:
                reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
            now = time.monotonic()
            address = f"{self._address}:{self._port}"
            if now > self._deadline:
                raise UserError(
                    f"rank {self._rank} cannot reach rank 0 at {address} ({reason}): check that the first "
                    "host has started, and that this host can reach this address (blockft doctor --hostfile "
                    "FILE)"
                )
            if not is_reported and now - start > REPORT_AFTER_S:
                is_reported = True
                notify(f"rank {self._rank} waits for rank 0 at {address}")
            time.sleep(0.2)

    def _listen(self) -> None:
        """Connect to rank 0 and act on its messages; runs in a thread until the process ends."""
        try:
            port, token = self._find_relay()
            connection = socket.create_connection((self._address, port), timeout=CONNECT_S)
        except (UserError, OSError) as error:
            text = str(error) if isinstance(error, UserError) else f"rank 0 cannot be reached: {error}"
            self._connect_error = UserError(text)
            self._is_connected.set()
            return
        _keep_alive(connection)
        _close_in_children(connection)
        self._connection = connection
        self._send(
            {
                "rank": self._rank,
                "host": socket.gethostname(),
                "node": self._node,
                "token": token,
                "facts": list_package_facts(),
            }
        )
        self._is_connected.set()
        self._read_messages(connection)
        if self._is_done:
            connection.close()

    def _read_messages(self, connection: socket.socket) -> None:
        reason = _describe_end(None)
        try:
            for line in connection.makefile("rb"):
                message = json.loads(line)
                if "failed" in message:
                    self._end(RankFailure(**message["failed"]))
                    return
                if "ready" in message:
                    self._all_ready.set()
                if "done" in message:
                    self._is_done = True
                    self._is_finished.set()
                    return
        except OSError as error:
            reason = _describe_end(error)
        except ValueError:  # rank 0 ended inside a message
            pass
        if not self._is_done:
            self._end(RankFailure(rank=0, host=self._address, node=0, reason=reason, has_ended=True))

    def _send(self, message: Mapping[str, Any]) -> bool:
        """Send a message to rank 0; return whether that was possible."""
        if self._connection is None:
            return False
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    # --- the end of a run that has failed

    def _end(self, failure: RankFailure) -> None:
        """End this process, unless its main thread ends by itself in time."""
        self._failure = failure
        self._has_failed.set()
        time.sleep(GRACE_S)
        with self._ending:
            if not self._is_done and not self._is_reporting:
                is_printer = failure.is_printed_by(self._rank, self._node)
                _print_and_exit(str(failure) if is_printer else "")

    def _report(self, error: BaseException) -> BaseException:
        """Tell rank 0 of the error that ends this rank; return the error to raise in its place."""
        if self._is_done:
            return error
        self._is_reporting = True
        if not isinstance(error, Exception):
            self._send({"error": "was interrupted"})
            return error
        is_lost = is_lost_connection(error)
        self._is_connected.wait(CONNECT_BEFORE_ERROR_S)
        if not is_lost:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self._tell(f"has failed: {kind}{first_line(error)}")
        self._has_failed.wait(REPLY_S if self._connection else 0)
        failure = self._failure
        if self._connection is None and isinstance(error, UserError):
            return RankError(str(error))
        if failure is None and is_lost:
            return UserError(
                f"rank {self._rank} has lost the connection to another rank ({first_line(error)}): check the "
                "network between the hosts, and resume with --resume"
            )
        if failure is None or not (is_lost or isinstance(error, UserError)):
            return error
        if failure.rank == self._rank and not is_lost:
            return RankError(str(error))
        if not is_lost and first_line(error) in failure.reason and failure.node != self._node:
            return error  # the same mistake on several hosts
        is_printer = failure.is_printed_by(self._rank, self._node)
        return RankError(str(failure)) if is_printer else ReportedError(str(failure))

    def _tell(self, reason: str) -> None:
        """Tell rank 0 why this rank ends; if it is not connected yet, do so when this process ends."""
        if self._send({"error": reason}) or not self._node:  # a launcher ends the other ranks of its host
            return

        def tell_later() -> None:
            self._is_connected.wait(CONNECT_AT_EXIT_S)
            self._send({"error": reason})

        atexit.register(tell_later)


class _LostRank(Exception):
    """Raised by a rank that waits when another one has failed."""


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error says only that another rank has ended."""
    is_gloo = isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_CONNECTION)
    return is_gloo or isinstance(error, (_LostRank, dist.DistError))


class _Relay:
    """Rank 0's side: it learns which ranks live, and tells all ranks which one failed first."""

    def __init__(self, num_ranks: int, deadline: float, address: str) -> None:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._listener = socket.create_server(
            ("", 0), family=family, backlog=1024, dualstack_ipv6=family == socket.AF_INET6
        )
        self.port, self.token = self._listener.getsockname()[1], secrets.token_hex(8)
        self._num_ranks, self._deadline, self._address = num_ranks, deadline, address
        self._start, self._is_reported = time.monotonic(), False
        self._facts = list_package_facts()
        self._peers: dict[socket.socket, _Peer] = {}
        self._missing = set(range(num_ranks))
        self._is_over = False
        self._failure: RankFailure | None = None
        _close_in_children(self._listener)

    def run(self) -> None:
        """Serve the ranks until all have ended; runs in a thread."""
        with self._listener, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while self._peers or not self._is_over:
                self._serve(selector)
                self._check_missing()

    def _serve(self, selector: selectors.BaseSelector) -> None:
        """Accept connections and read messages, for a second at most if none comes."""
        for key, _ in selector.select(timeout=1):
            connection: Any = key.fileobj
            if connection is self._listener:
                connection, _ = self._listener.accept()
                _keep_alive(connection)
                _close_in_children(connection)
                self._peers[connection] = _Peer()
                selector.register(connection, selectors.EVENT_READ)
            elif not self._receive(connection):
                selector.unregister(connection)
                del self._peers[connection]
                connection.close()

    def _receive(self, connection: Any) -> bool:
        """Read what a rank has sent; return False when its connection has ended."""
        peer, reason, received = self._peers[connection], _describe_end(None), b""
        try:
            received = connection.recv(1 << 16)
        except OSError as error:
            reason = _describe_end(error)
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
        return True

    def _handle(self, peer: _Peer, connection: socket.socket, message: dict[str, Any]) -> None:
        if peer.rank < 0:
            if message["token"] != self.token:
                raise ValueError("not a rank of this run")
            peer.rank, peer.host, peer.node = message["rank"], message["host"], message["node"]
            self._missing.discard(peer.rank)
            if self._failure:
                self._send(connection, {"failed": asdict(self._failure)})
            owner, reference = f"rank {peer.rank} on {peer.host}", "rank 0"
            difference = describe_difference(message["facts"], self._facts, owner=owner, reference=reference)
            if difference:
                self._fail(peer, difference.removeprefix(f"{owner} "))
        if "ready" in message:
            peer.is_ready = True
            if sum(peer.is_ready for peer in self._peers.values()) == self._num_ranks:
                self._broadcast({"ready": True})
        if "error" in message:
            peer.is_done = True
            self._fail(peer, message["error"], prints_itself=True)
        if "done" in message:
            peer.is_done = True
            if peer.rank == 0:
                self._is_over = True
                self._broadcast({"done": True})
            else:
                self._send(connection, {"done": True})

    def _check_missing(self) -> None:
        """Name the ranks that have not connected: on stderr after a while, as a failure in the end."""
        now = time.monotonic()
        if self._is_reported and now < self._deadline:
            return
        missing = sorted(self._missing)
        if not missing or self._failure or now - self._start < REPORT_AFTER_S:
            return
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        if not self._is_reported:
            self._is_reported = True
            notify(f"rank 0 waits for {len(missing)} of {self._num_ranks} ranks at {self._address}: {names}")
        if now > self._deadline:
            reason = (
                f"has not connected to {self._address} in time: check that its host has started and can "
                "reach this address (blockft doctor --hostfile FILE)"
            )
            self._fail(_Peer(rank=missing[0], host="its host"), reason)

    def _fail(
        self, peer: _Peer, reason: str, *, prints_itself: bool = False, has_ended: bool = False
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


# --- sockets and processes


def _describe_end(error: OSError | None) -> str:
    """Return why a rank's connection has ended: without an error, or with that of reading it."""
    if error is None or isinstance(error, ConnectionError):
        return "ended without a message: it was killed, most likely because memory ran out"
    return f"no longer answers ({error.strerror}): its host or the network between the hosts has failed"


def _keep_alive(connection: socket.socket) -> None:
    """Make the kernel probe a connection, so that a host that vanished is found."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_AFTER_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_PROBES)
    # data that is not acknowledged turns the probes off
    limit_ms = 1000 * (PROBE_AFTER_S + PROBE_EVERY_S * NUM_PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)


def _close_in_children(connection: socket.socket) -> None:
    """Close a socket in forked children: otherwise they would keep it open after this process has ended."""

    def close() -> None:
        descriptor = connection.detach()  # `close` would wait for the files that read the socket
        if descriptor >= 0:
            os.close(descriptor)

    os.register_at_fork(after_in_child=close)


def _print_and_exit(message: str) -> None:
    """Print a message, unless it is empty, and end this process, whatever its main thread does."""
    if message:
        with suppress(OSError, ValueError, AttributeError):
            print_text(f"blockft: {' '.join(message.split())}", file=sys.stderr, flush=True)
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    os._exit(EXIT_CODE)
