"""What a host of a run tells about itself: `python -m blockft.training.host_probe REQUEST` prints JSON.

It runs on every host at the same time. The first host listens on the master port while the others connect to
it. Only modules of Python and light modules of blockft are imported, so that it takes a second.
"""

import base64
import hashlib
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from blockft.errors import UserError
from blockft.inputs import existing_parent
from blockft.printable import print_text
from blockft.training.package_facts import list_package_facts

CONNECT_S = 12
"""Time in which the hosts must reach the first host, which may start its probe later."""

SHARED_S, SHARED_GRACE_S = CONNECT_S + 6, 2
"""Time in which a host must see the files of the others, and for which it keeps its own file afterwards. The
others may first try to connect until CONNECT_S has passed."""

HASHED_BYTES = 1 << 20
"""Of larger files of a model only names and sizes are compared."""


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """What all hosts are asked. `output_dir` is None if the shared folder is not checked."""

    num_hosts: int
    master_addr: str
    master_port: int
    data_dir: str | None
    model: str | None
    output_dir: str | None
    token: str

    def encode(self) -> str:
        """Return the request as a word that no shell changes."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    @classmethod
    def decode(cls, word: str) -> "ProbeRequest":
        """Return the request that `encode` wrote."""
        return cls(**json.loads(base64.urlsafe_b64decode(word)))


def probe(request: ProbeRequest, index: int) -> dict[str, Any]:
    """Return what this host, the one with this place in the hostfile, has and reaches."""
    found: dict[str, Any] = {"index": index, "facts": list_package_facts(), "clock_s": time.time()}
    found["data"] = _digest_file(Path(request.data_dir) / "manifest.json") if request.data_dir else None
    found["model"] = _digest_model(Path(request.model)) if request.model else None
    found["identity"] = _identify_host()
    found["variables"] = {
        name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name in os.environ
    }
    found["interfaces"] = sorted(psutil.net_if_addrs())
    serve_or_connect = _listen if index == 0 else _connect
    found["network_error"], found["interface"] = serve_or_connect(request)
    if request.output_dir is not None:
        found["shared"] = _see_files(Path(request.output_dir), request, index)
    return found


def _identify_host() -> str:
    """Return a text that only processes of the same host, or of the same container, share; "" if unknown."""
    try:
        spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("net", "pid")]
        return " ".join([Path("/proc/sys/kernel/random/boot_id").read_text().strip(), *spaces])
    except OSError:
        return ""


def _listen(request: ProbeRequest) -> tuple[str, str]:
    """Wait for the other hosts at the master port; return what failed, and the name of the interface."""
    try:
        listener = socket.create_server(("", request.master_port), backlog=1024)
    except OSError as error:
        return f"port {request.master_port} is in use ({os.strerror(error.errno or 0)})", ""
    interface, missing = "", request.num_hosts - 1
    deadline = time.monotonic() + CONNECT_S
    with listener:
        while missing and (left_s := deadline - time.monotonic()) > 0:
            listener.settimeout(left_s)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                break
            with connection:
                connection.settimeout(2)
                interface = interface or _name_interface(connection.getsockname()[0])
                try:
                    connection.sendall(request.token.encode())
                    missing -= connection.recv(64) == request.token.encode()
                except OSError:
                    continue
    return "", interface


def _connect(request: ProbeRequest) -> tuple[str, str]:
    """Connect to the first host; return what failed, and the name of the interface."""
    deadline, reason = time.monotonic() + CONNECT_S, "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(
                (request.master_addr, request.master_port), timeout=3
            ) as connection:
                if connection.recv(64) != request.token.encode():
                    return "another program answers there", ""
                connection.sendall(request.token.encode())
                return "", _name_interface(connection.getsockname()[0])
        except OSError as error:
            reason = error.strerror or "no answer"
        time.sleep(0.2)
    return reason, ""


def _name_interface(address: str) -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return address


def _see_files(output_dir: Path, request: ProbeRequest, index: int) -> dict[str, Any]:
    """Write a file beside the output folder; return an error, or which hosts' files are not seen."""
    folder = output_dir.absolute().parent
    try:
        folder = existing_parent(folder)
        own = folder / f".{request.token}.{index}"
        own.touch()
    except UserError as error:
        return {"error": str(error), "missing": []}
    except OSError as error:
        remedy = "make it writable on every host"
        return {"error": f"{folder} cannot be written ({error.strerror}): {remedy}", "missing": []}
    expected = {f".{request.token}.{i}" for i in range(request.num_hosts)}
    deadline = time.monotonic() + SHARED_S
    try:
        # a listing is fresh where a network file system remembers that a file was missing
        while (missing := expected - set(os.listdir(folder))) and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(SHARED_GRACE_S)
    finally:
        own.unlink(missing_ok=True)
    return {"error": "", "missing": sorted(int(name.rpartition(".")[2]) for name in missing)}


def _digest_file(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        return f"missing: {path} ({error.strerror})"


def _digest_model(folder: Path) -> str:
    """Return a digest of the names and sizes of a model's files, and of the content of small ones."""
    if not folder.is_dir():
        return f"missing: {folder} is no folder"
    digest = hashlib.sha256()
    try:
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                size = path.stat().st_size
                content = _digest_file(path) if size <= HASHED_BYTES else ""
                digest.update(f"{path.name}\0{size}\0{content}\n".encode())
    except OSError as error:
        return f"missing: {folder} cannot be read ({error.strerror})"
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    print_text(json.dumps(probe(ProbeRequest.decode(sys.argv[1]), int(sys.argv[2]))), flush=True)
