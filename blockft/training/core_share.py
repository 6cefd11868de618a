"""The share of a host's cores that one rank computes with: what the ranks of the host may use together.

A rank may use the cores of its affinity, which a launcher (SLURM, numactl, taskset) or the cpuset of a
container limits, and the time of its control groups, which a container limits (cgroup v2 only). Ranks that
were bound to different cores share nothing, and ranks that may use the same cores divide them.
"""

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_CGROUP_NAMESPACE = Path("/proc/self/ns/cgroup")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True)
class UsableCores:
    """What one rank may use of its host.

    host: tells hosts apart.
    cores: the numbers of the cores on which the rank may run.
    quotas: by control group, the time that its processes may use together, in cores.
    """

    host: str
    cores: frozenset[int]
    quotas: Mapping[str, Fraction]


def find_usable_cores() -> UsableCores:
    """Return what this process may use."""
    host = socket.gethostname()
    with suppress(OSError):  # as NCCL does, because clones of a machine may have the same name
        host += f" {_BOOT_ID.read_text()}"
    return UsableCores(host=host, cores=frozenset(os.sched_getaffinity(0)), quotas=_read_quotas())


def share_threads(own: UsableCores, ranks: Sequence[UsableCores], num_threads: int) -> int:
    """Return the number of threads of a rank, which has one at least.

    Each core and each quota is divided evenly between the ranks that may use it.

    own: what the rank may use; it is one of `ranks`, which are all ranks of the run.
    num_threads: its threads if it used all its cores alone: their number, or fewer with hyperthreads.
    """
    neighbours = [rank for rank in ranks if rank.host == own.host]
    num_users = Counter(core for rank in neighbours for core in rank.cores)
    own_part = sum((Fraction(1, num_users[core]) for core in own.cores), Fraction()) / len(own.cores)
    num_members = Counter(group for rank in neighbours for group in rank.quotas)
    limits = [quota / num_members[group] for group, quota in own.quotas.items()]
    return max(1, int(min([num_threads * own_part, *limits])))


def _read_quotas() -> dict[str, Fraction]:
    """Return the quotas of the control groups of this process, by a name that tells groups of a host apart.

    Without control groups of version 2 there is none.
    """
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
        namespace = _CGROUP_NAMESPACE.stat().st_ino  # each container may call its group /
    except OSError:
        return {}
    quotas = {}
    for path in [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]:
        for group in (Path(path), *Path(path).parents):
            with suppress(OSError):  # the root of a host has no quota, and a container may hide its parents
                limit, period = (_CGROUPS / group / "cpu.max").read_text().split()
                if limit != "max":
                    quotas[f"{namespace} {group}"] = Fraction(int(limit), int(period))
    return quotas
