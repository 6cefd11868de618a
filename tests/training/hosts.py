"""Options that launch a training on hosts which are all this machine."""

from pathlib import Path


def node_options(node_rank: int, hostfile: Path, port: int) -> list[str]:
    """Return the options that start one host of a hostfile, without ssh."""
    address = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    return ["--hostfile", str(hostfile), "--no-ssh", "--node-rank", str(node_rank), *address]
