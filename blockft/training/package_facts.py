"""What must be equal on all hosts of a run: versions of Python and packages, and blockft's own code."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from blockft.version import __version__

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "peft", "tokenizers")
"""Packages whose version is compared between hosts."""

CODE = "the code of blockft"
"""Name of the digest of this package's files."""


def list_package_facts() -> dict[str, str]:
    """Return the versions of Python and of packages, and a digest of this package's files, by name.

    Imports no package, so that it takes only milliseconds.
    """
    facts = {"Python": ".".join(platform.python_version_tuple()[:2]), "blockft": __version__}
    facts[CODE] = _digest_code(Path(__file__).parents[1])
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "missing"
    return facts


def describe_difference(facts: dict[str, str], other: dict[str, str], *, owner: str, reference: str) -> str:
    """Return a sentence about the first fact in which `owner` differs from `reference`, or ""."""
    for name, expected in other.items():
        found = facts.get(name, "missing")
        if found == expected:
            continue
        if name == CODE:
            return (
                f"{owner} and {reference} have different files of the package blockft: install the same "
                "blockft on every host"
            )
        return (
            f"{owner} has {name} {found}, but {reference} has {expected}: install the same version on every "
            "host"
        )
    return ""


def _digest_code(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]
