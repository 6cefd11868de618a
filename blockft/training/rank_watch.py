"""Watch the ranks of a run: when one rank ends before its time, all others end within seconds and name it.

Without a watch the other ranks wait in a collective until its time limit, which must be long: saving, an
evaluation or the first compilation may take many minutes. The watch sees only whether processes live. Rank 0
listens on a port, every rank holds one connection to it, and the kernel closes the connection of a process
that ends. Probes of the kernel find a host that no longer answers. A process that is slow or stopped is not
taken for a failed one, because its kernel answers.

The watch is the first thing that a rank does, before slow imports and before it reads data, so that a rank
that fails there ends the run, too. For this reason it imports only light modules. Rank 0 listens at
MASTER_ADDR:MASTER_PORT until all ranks are ready, and then leaves the port to torch's store. Where a store
serves this port already (that of torchrun, or of an earlier run of this process), it listens at another port
and tells the ranks through the store. `rank_relay` is the side of rank 0.
"""

import atexit
import codecs
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

from blockft.errors import (
    INTERNAL_ERROR,
    INTERRUPTED,
    USER_ERROR,
    RankError,
    ReportedError,
    UserError,
    first_line,
    is_first_of_host,
    notify,
)
from blockft.printable import print_text
from blockft.training.package_facts import list_package_facts
from blockft.training.rank_relay import (
    GREETING,
    REPORT_AFTER_S,
    SIBLING_S,
    RankFailure,
    RankRelay,
    close_in_children,
    describe_end,
    keep_alive,
)
from blockft.training.worker_environment import check_worker_environment, read_num_local, read_timeout_minutes

CONNECT_S = 10
"""Longest wait for the answer to one attempt to connect."""

OTHER_PROGRAM_S = 30
"""A port at which another program has answered for longer than this is not waited for any more."""

GRACE_S = 1.0
"""Time in which a failed rank prints its own error, before the others print theirs and end."""

REPLY_S = 5.0
"""Longest wait of a rank that has failed until rank 0 says which rank failed first."""

CONNECT_BEFORE_ERROR_S = 3
"""Longest wait of a rank that fails before it is connected, until it prints its error."""

LATE_S = 30
"""Longest wait of a failed process at its end, until all ranks are connected and know of the failure."""

_LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Texts of the errors of Gloo when a rank has ended."""

_num_watches = count()


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """A rank, the first rank of its host (`node`), the number of ranks, and the address of the first host.

    `num_local` ranks of this host start at the same moment, this one included. Hosts that start their ranks
    themselves watch each other in the same way; `noun` is then "node".
    """

    rank: int
    node: int
    num_ranks: int
    address: str
    port: int
    noun: str = "rank"
    num_local: int = 1

    @classmethod
    def from_environment(cls, *, has_just_started: bool) -> "RankPlace":
        """Return the place of this process, from the variables that a launcher sets.

        `has_just_started`: this process has done nothing else yet.

        Raises:
            UserError: see `check_worker_environment`.
        """
        check_worker_environment()
        rank = int(os.environ["RANK"])
        return cls(
            rank=rank,
            node=rank - int(os.environ["LOCAL_RANK"]),
            num_ranks=int(os.environ["WORLD_SIZE"]),
            address=os.environ["MASTER_ADDR"],
            port=int(os.environ["MASTER_PORT"]),
            num_local=read_num_local() if has_just_started else 1,
        )


class RankWatch:
    """This rank's part of the watch. All ranks make one at the start of a run.

    Use `watching` around everything that the ranks do together. Outside of the main thread nothing is raised:
    a rank that is waiting in a collective when another one fails is ended with that one's exit code. If
    `on_failure` is set, it is called in place of this.

    Raises:
        UserError: the port of rank 0 is in use.
    """

    def __init__(self, place: RankPlace, *, timeout_s: float) -> None:
        self.on_failure: Callable[[RankFailure], object] | None = None
        self._place = place
        self._deadline = time.monotonic() + timeout_s
        self._connection: socket.socket | None = None
        self._failure: RankFailure | None = None
        self._connect_error: UserError | None = None
        self._is_done, self._is_reporting = False, False
        self._has_failed, self._is_connected = threading.Event(), threading.Event()
        self._all_ready, self._is_finished = threading.Event(), threading.Event()
        self._ending = threading.Lock()
        # torchrun starts the ranks again in the same store
        attempt, number = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(_num_watches)
        self._key = f"blockft/watch/{attempt}/{number}"
        self._has_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._uses_store = self._has_agent_store or number > 0
        self._store: Any = None
        if self._uses_store:  # in a thread, the import could meet one of the main thread
            import torch.distributed  # noqa: F401
        # for the same reason: a thread that imports waits for the import that the main thread is in
        codecs.lookup("idna")  # of names of hosts
        self._facts = list_package_facts()
        self._relay = self._start_relay(timeout_s) if place.rank == 0 else None
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
            # from here on the watching thread does not end this process
            with _sigterm_ignored(), self._ending:
                raised = self.report(error)
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
        """Wait until every rank of the run calls this function. Then rank 0 accepts no more connections.

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

    def leave_port(self, *, to_store: bool) -> None:
        """Close the port of the first host, or serve torch's store there. All ranks must be ready."""
        if self._relay and not self._uses_store:
            listener = self._relay.take_listener()
            if to_store:
                self._store = self._open_store(CONNECT_S, listener=listener)
            else:
                listener.close()

    @contextmanager
    def time_limit(self, seconds: float, message: str) -> Iterator[None]:
        """End this process with a message if what happens inside takes longer, also if it is stuck."""

        def end() -> None:
            with self._ending:
                if not is_first_of_host():
                    time.sleep(REPLY_S)  # the end of this process would be printed in place of the message
                _print(message if is_first_of_host() else "")
                os._exit(USER_ERROR)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    # --- the connection to rank 0

    def _start_relay(self, timeout_s: float) -> RankRelay:
        place = self._place
        relay = RankRelay(
            0 if self._uses_store else place.port,
            num_ranks=place.num_ranks,
            deadline=self._deadline,
            address=f"{place.address}:{place.port}",
            noun=place.noun,
        )
        if self._uses_store:
            self._store = self._open_store(timeout_s)
            self._store.set(self._key, str(relay.port))
        threading.Thread(target=relay.run, daemon=True, name="rank watch relay").start()
        return relay

    def _open_store(self, timeout_s: float, listener: socket.socket | None = None) -> Any:
        """Return torch's store; rank 0 serves it at `listener`, except under torchrun, whose agent does."""
        import torch.distributed as dist

        return dist.TCPStore(  # type: ignore[attr-defined]
            self._place.address,
            self._place.port,
            world_size=self._place.num_ranks,
            is_master=self._place.rank == 0 and not self._has_agent_store,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,  # the process group uses the same server
            master_listen_fd=listener.detach() if listener else None,
        )

    def _connect(self) -> socket.socket:
        """Return a connection to rank 0, which may start later than this rank.

        Raises:
            UserError: rank 0 cannot be reached in time.
        """
        start, is_reported, other_since = time.monotonic(), False, None
        address, noun = f"{self._place.address}:{self._place.port}", self._place.noun
        self_name = f"{noun} {self._place.rank}"
        while True:
            try:
                return self._try_to_connect()
            except (OSError, RuntimeError, ValueError) as error:
                reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
                now = time.monotonic()
                other_since = (other_since or now) if isinstance(error, _OtherProgram) else None
            if other_since and now - other_since > OTHER_PROGRAM_S:
                raise UserError(
                    f"{self_name} cannot reach {noun} 0, because {reason} at {address}: choose another port "
                    "with --master-port (MASTER_PORT of another launcher)"
                )
            if self._place.num_local > 1 and self._place.node == 0 and now - start > SIBLING_S:
                raise UserError(
                    f"{self_name} cannot reach {noun} 0 of the same host at {address} ({reason}), which was "
                    f"started at the same time: it {describe_end(None)}"
                )
            if now > self._deadline:
                raise UserError(
                    f"{self_name} cannot reach {noun} 0 at {address} ({reason}): check that the first host "
                    "has started, and that this host can reach this address (blockft doctor --hostfile FILE)"
                )
            if not is_reported and now - start > REPORT_AFTER_S:
                is_reported = True
                notify(f"{self_name} waits for {noun} 0 at {address} ({reason})")
            time.sleep(0.2)

    def _try_to_connect(self) -> socket.socket:
        address, port = self._place.address, self._place.port
        if self._uses_store:
            # the client of the store prints a stack trace if it cannot connect
            socket.create_connection((address, port), timeout=CONNECT_S).close()
            port = int((self._store or self._open_store(CONNECT_S)).get(self._key))
        connection = socket.create_connection((address, port), timeout=CONNECT_S)
        try:
            connection.sendall(GREETING)
            answer = b""
            while len(answer) < len(GREETING) and (part := connection.recv(len(GREETING) - len(answer))):
                answer += part
            if answer != GREETING:
                raise _OtherProgram("another program answers")
        except ConnectionError as error:
            connection.close()
            raise _OtherProgram("another program answers") from error
        except BaseException:
            connection.close()
            raise
        keep_alive(connection)
        close_in_children(connection)
        return connection

    def _listen(self) -> None:
        """Connect to rank 0 and act on its messages; runs in a thread until the process ends."""
        try:
            self._connection = self._connect()
        except UserError as error:
            self._connect_error = error
            self._is_connected.set()
            return
        self._send(
            {
                "rank": self._place.rank,
                "num_ranks": self._place.num_ranks,
                "host": socket.gethostname(),
                "node": self._place.node,
                "num_local": self._place.num_local,
                "facts": self._facts,
            }
        )
        self._is_connected.set()
        self._read_messages(self._connection)
        if self._is_done:
            self._connection.close()

    def _read_messages(self, connection: socket.socket) -> None:
        reason = describe_end(None)
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
            reason = describe_end(error)
        except ValueError:  # rank 0 ended inside a message
            pass
        if not self._is_done:
            first, noun = self._place.address, self._place.noun
            self._end(RankFailure(rank=0, host=first, node=0, reason=reason, has_ended=True, noun=noun))

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

    def report(self, error: BaseException) -> BaseException:
        """Tell rank 0 of the error that ends this rank; return the error to raise in its place."""
        if self._is_done:
            return error
        self._is_reporting = True
        is_lost = is_lost_connection(error)
        if not isinstance(error, Exception):
            is_signal = isinstance(error, KeyboardInterrupt)
            reason = "was interrupted" if is_signal else f"has ended by {type(error).__name__} ({error})"
            self._send({"error": reason, "exit_code": _exit_code(error)})
            return error
        self._is_connected.wait(CONNECT_BEFORE_ERROR_S)
        if not is_lost:
            self._tell(error)
        self._has_failed.wait(REPLY_S if self._connection else 0)
        if self._failure and self._failure.rank != self._place.rank:
            time.sleep(GRACE_S)
        return self._choose_error(error, self._failure, is_lost=is_lost)

    def _choose_error(self, error: Exception, failure: RankFailure | None, *, is_lost: bool) -> Exception:
        """Return the error that this rank raises: its own, or the failure of another rank."""
        rank, node = self._place.rank, self._place.node
        if self._connection is None and isinstance(error, UserError):
            return RankError(str(error))
        if failure is None and is_lost:
            return UserError(
                f"{self._place.noun} {rank} has lost the connection to another ({first_line(error)}): check "
                "the network between the hosts, and resume with --resume"
            )
        if failure is None or not (is_lost or isinstance(error, UserError)):
            return error
        if failure.rank == rank and not is_lost:
            return error if isinstance(error, RankError) else RankError(str(error))
        if not is_lost and first_line(error) in failure.reason and failure.node != node:
            return error  # the same mistake on several hosts
        kind = RankError if failure.is_printed_by(rank, node) else ReportedError
        return kind(str(failure), exit_code=failure.exit_code)

    def _tell(self, error: Exception) -> None:
        """Tell rank 0 why this rank ends.

        If this or other ranks are not connected yet, this process waits for them when it ends.
        """
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        message = {"error": f"has failed: {kind}{first_line(error)}", "exit_code": _exit_code(error)}
        is_told = self._send(message)

        def tell_later() -> None:
            self._is_connected.wait(LATE_S)
            self._send(message)

        if not is_told:
            atexit.register(tell_later)
        if self._relay:
            atexit.register(self._relay.wait_until_all_connected, LATE_S)

    def _end(self, failure: RankFailure) -> None:
        """End this process, unless its main thread ends by itself in time."""
        self._failure = failure
        self._has_failed.set()
        if self.on_failure:
            self.on_failure(failure)
            return
        time.sleep(GRACE_S)
        with self._ending:
            if not self._is_done and not self._is_reporting:
                is_printer = failure.is_printed_by(self._place.rank, self._place.node)
                _print(str(failure) if is_printer else "")
                if self._relay:  # a rank that starts later would wait for this one
                    self._relay.wait_until_all_connected(LATE_S)
                os._exit(failure.exit_code)


_active: RankWatch | None = None
"""The watch of this process."""


@contextmanager
def watching_ranks(*, has_just_started: bool = False) -> Iterator[RankWatch | None]:
    """Watch the other ranks of this run while the context lasts; None if there are none.

    `has_just_started`: this process has done nothing else yet, so that the ranks of a host, which start at
    the same moment, connect at nearly the same moment. Inside of another such context the watch is that
    one's.

    Raises:
        UserError: a variable of the launcher is wrong, the port of the first host is in use, or another rank
            has failed.
    """
    global _active
    if _active or os.environ.get("WORLD_SIZE", "1") == "1":
        yield _active
        return
    place = RankPlace.from_environment(has_just_started=has_just_started)
    watch = _active = RankWatch(place, timeout_s=60 * read_timeout_minutes())
    try:
        with watch.watching():
            yield watch
    finally:
        _active = None


@contextmanager
def watching_hosts(place: RankPlace) -> Iterator[RankWatch]:
    """Watch the other hosts of a run, each of which starts its ranks itself.

    `place` is that of this host. Without the watch the ranks of a host would wait for a host that fails
    before it has started its own.

    Raises:
        UserError: the port of the first host is in use, or another host has failed.
    """
    watch = RankWatch(place, timeout_s=60 * read_timeout_minutes())
    with watch.watching():
        yield watch


@contextmanager
def _sigterm_ignored() -> Iterator[None]:
    """Ignore SIGTERM, which a launcher sends to all ranks when one has ended: they must still name it.

    This rank ends by itself in a few seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)


class _LostRank(Exception):
    """Raised by a rank that waits when another one has failed."""


class _OtherProgram(OSError):
    """Raised if a program that is not rank 0 answers at its port."""


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error says only that another rank has ended."""
    is_gloo = isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_CONNECTION)
    dist = sys.modules.get("torch.distributed")  # without it no error is one of torch
    is_lost = isinstance(error, _LostRank) or (dist is not None and isinstance(error, dist.DistError))
    return is_gloo or is_lost


def _exit_code(error: BaseException) -> int:
    """Return the exit code of a rank that ends with an error."""
    if isinstance(error, UserError):
        return error.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else INTERNAL_ERROR


def _print(message: str) -> None:
    """Print a message on stderr, unless it is empty, and write out what was printed before."""
    if message:
        with suppress(OSError, ValueError, AttributeError):
            print_text(f"blockft: {' '.join(message.split())}", file=sys.stderr, flush=True)
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
