"""Ranks of a host divide what they may use together, and nothing else."""

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import pytest

from blockft.training import core_share
from blockft.training.core_share import UsableCores, find_usable_cores, share_threads


def rank(cores: Iterable[int], host: str = "a", quotas: dict[str, Fraction] | None = None) -> UsableCores:
    return UsableCores(host=host, cores=frozenset(cores), quotas=quotas or {})


def shares(*ranks: UsableCores) -> list[int]:
    return [share_threads(own, ranks, len(own.cores)) for own in ranks]


def test_ranks_of_other_hosts_do_not_count() -> None:
    assert shares(*[rank(range(8), "a")] * 2, *[rank(range(8), "b")] * 4) == [4, 4, 2, 2, 2, 2]


def test_a_core_that_only_some_ranks_use_is_divided_between_them() -> None:
    # 6 cores of its own and 2 halves; 2 halves and 4 of its own
    assert shares(rank(range(8)), rank(range(6, 12))) == [7, 5]


@pytest.mark.parametrize("num_ranks", [1, 3, 7, 48])
def test_ranks_of_all_cores_have_together_as_many_threads_as_there_are_cores(num_ranks: int) -> None:
    assert shares(*[rank(range(48))] * num_ranks) == [48 // num_ranks] * num_ranks


def test_hyperthreads_that_do_not_count_alone_do_not_count_in_a_share() -> None:
    ranks = [rank(range(16)), rank(range(16))]
    assert share_threads(ranks[0], ranks, 8) == 4


def test_members_of_a_control_group_divide_its_quota() -> None:
    pod = {"1 .": Fraction(6)}
    assert shares(rank(range(64), quotas=pod)) == [6]
    assert shares(*[rank(range(64), quotas=pod)] * 3) == [2, 2, 2]
    # each in its own container
    assert shares(*[rank(range(64), quotas={f"{i} .": Fraction(6)}) for i in range(3)]) == [6, 6, 6]


def test_the_smallest_limit_counts() -> None:
    both = {"1 .": Fraction(12), "1 task": Fraction(9, 2)}
    assert shares(rank(range(64), quotas=both)) == [4]
    assert shares(rank(range(3), quotas=both)) == [3]
    assert shares(rank(range(64), quotas={"1 .": Fraction(1, 2)})) == [1]


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/", {"cpu.max": "400000 100000\n"}, {".": Fraction(4)}),
        ("0::/", {"cpu.max": "max 100000\n"}, {}),
        ("0::/", {}, {}),
        (
            "0::/pods/one/task",
            {
                "pods/cpu.max": "1600000 100000\n",
                "pods/one/cpu.max": "max 100000\n",
                "pods/one/task/cpu.max": "150000 100000\n",
            },
            {"pods/one/task": Fraction(3, 2), "pods": Fraction(16)},
        ),
        # version 1, which has another hierarchy for each resource
        ("4:cpu,cpuacct:/docker/1", {"cpu.max": "400000 100000\n"}, {}),
    ],
)
def test_quotas_are_those_of_the_control_group_and_its_parents(
    line: str,
    files: dict[str, str],
    expected: dict[str, Fraction],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    own = tmp_path / "own"
    own.write_text(f"{line}\n")
    monkeypatch.setattr(core_share, "_CGROUPS", tmp_path)
    monkeypatch.setattr(core_share, "_OWN_CGROUP", own)
    namespace = Path("/proc/self/ns/cgroup").stat().st_ino
    found = find_usable_cores().quotas
    assert found == {f"{namespace} {group}": quota for group, quota in expected.items()}


def test_the_cores_are_those_of_the_affinity() -> None:
    assert find_usable_cores().cores == os.sched_getaffinity(0)
    assert find_usable_cores() == find_usable_cores()
