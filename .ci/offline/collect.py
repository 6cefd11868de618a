#!/usr/bin/env python3
"""Collect the wheels that a GPU host without a network lacks; install.sh installs them there.

uv resolves the packages for the host, and pip downloads those that HAVE does not list. Versions in HAVE are
constraints. A bare name in HAVE is a package of unknown version, which install.sh checks on the host. DEST is
created when it is complete. Both tools use the index that they are configured for.
"""

import argparse
import fnmatch
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ONLY = {"deepspeed": {"DS_BUILD_OPS": "0"}}
"""Packages without wheels, and the variables with which they build a pure Python one."""
NOT_FOR_TESTS = {"wandb", "ruff", "mypy", "pre-commit"}
"""Requirements in pyproject.toml that no GPU test imports."""
DROPPED_FROM_TESTS = [f"bitsandbytes/libbitsandbytes_{kind}*.so" for kind in ("cuda1[12]", "rocm", "xpu")]
"""Libraries of bitsandbytes for other devices than GPUs with CUDA 13: 36 MB."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Collect the wheels that a GPU host without a network lacks."
    )
    parser.add_argument("have", type=Path, metavar="HAVE", help="a file with the host's `pip freeze`")
    parser.add_argument("dest", type=Path, metavar="DEST", help="a new folder for the wheels")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="default: blockft and its GPU tests")
    several: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument(
        "--keep", metavar="NAME", **several, help="use the host's version, whatever the packages require"
    )
    parser.add_argument(
        "--without", metavar="NAME", **several, help="leave a package out that the others require"
    )
    parser.add_argument("--drop", metavar="GLOB", **several, help="remove these files from the wheels")
    parser.add_argument("--python", default="3.12", help="version of the host's Python (default: 3.12)")
    parser.add_argument("--glibc", default="2.28", help="the host's glibc or an older one (default: 2.28)")
    options = parser.parse_args()

    have = read_have(options.have)
    keep = {normalize(name) for name in options.keep}
    without = {normalize(name) for name in options.without}
    if unknown := keep - have.keys():
        fail(f"--keep {', '.join(sorted(unknown))}: {options.have} does not list it")
    if options.dest.exists():
        fail(f"{options.dest} exists: name a new folder")
    options.dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".collect-", dir=options.dest.parent) as temporary:
        work = Path(temporary)
        tools = install_uv(work / "tools")
        requirements = options.packages or read_test_requirements()
        write_requirements(work, requirements, have, keep, without)
        pins = resolve(work, tools, options.python, options.glibc)
        missing = {name: version for name, version in pins.items() if name not in have}
        if not missing:
            fail("the host has all packages")
        wheels = work / "wheels"
        wheels.mkdir()
        download(missing, wheels, tools, options.python, options.glibc)
        check_complete(missing, wheels)
        for pattern in options.drop if options.packages else [*DROPPED_FROM_TESTS, *options.drop]:
            drop_files(wheels, pattern)
        wheels.rename(options.dest)
    num_bytes = sum(file.stat().st_size for file in options.dest.iterdir())
    print(f"{options.dest}: {len(missing)} wheels, {num_bytes / 1e6:.1f} MB")
    if num_unknown := sum(name in have and have[name] is None for name in pins):
        print(f"{options.have} has no version of {num_unknown} required packages: install.sh checks them")


def fail(fault: str) -> NoReturn:
    sys.exit(f"collect: {fault}")


def normalize(name: str) -> str:
    """Return the name of a package as indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_have(file: Path) -> dict[str, str | None]:
    """Return the version of each package of the host without a local part (+cu130); None for a bare name."""
    if not file.is_file():
        fail(f"{file} is not a file")
    have: dict[str, str | None] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"([A-Za-z0-9][\w.-]*)(?:==([\w.!]+)(?:\+[\w.]+)?| @ \S+)?", text)
        if not found:
            fail(f"{file}, line {number}: {text!r} is not NAME, NAME==VERSION or NAME @ URL")
        have[normalize(found[1])] = found[2]
    if not have:
        fail(f"{file} lists no package")
    return have


def read_test_requirements() -> list[str]:
    """Return the requirements of blockft and its GPU tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [text for text in requirements if re.split(r"[^\w.-]", text)[0] not in NOT_FOR_TESTS]


def install_uv(folder: Path) -> Path:
    """Return the folder of programs of a new environment with pip and uv."""
    venv.create(folder, with_pip=True)
    run([folder / "bin/python", "-m", "pip", "install", "--quiet", "uv"], "uv cannot be installed")
    return folder / "bin"


def write_requirements(
    work: Path, requirements: list[str], have: dict[str, str | None], keep: set[str], without: set[str]
) -> None:
    """Write uv's files: requirements, constraints, and overrides, which replace what packages require."""
    pinned = {name: f"{name}=={version}" if version else name for name, version in have.items()}
    nowhere = [f"{name}; python_version < '0'" for name in sorted(without)]
    files = {
        "requirements": requirements,
        "constraints": [text for name, text in pinned.items() if name not in keep],
        "overrides": [*(pinned[name] for name in sorted(keep)), *nowhere],
    }
    for name, lines in files.items():
        (work / name).write_text("".join(f"{line}\n" for line in lines))


def resolve(work: Path, tools: Path, python: str, glibc: str) -> dict[str, str]:
    """Return the version of each package that the host needs."""
    platform = f"x86_64-manylinux_{glibc.replace('.', '_')}"
    command = [
        *(tools / "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-python-downloads"),
        *("--python-version", python, "--python-platform", platform),
        *("--constraint", work / "constraints", "--override", work / "overrides"),
        *("--only-binary=:all:", *(f"--no-binary={name}" for name in SOURCE_ONLY)),
        *("--output-file", work / "pins", work / "requirements"),
    ]
    variables = {key: value for build in SOURCE_ONLY.values() for key, value in build.items()}
    run(command, "the packages do not fit the host's: see --keep, --without and --glibc", variables)
    pins = (line.split("==") for line in (work / "pins").read_text().splitlines())
    return {normalize(name): version for name, version in pins}


def download(missing: dict[str, str], wheels: Path, tools: Path, python: str, glibc: str) -> None:
    """Download a wheel of each version; build those of packages without wheels."""
    pip = [tools / "python", "-m", "pip"]
    # pip takes the tags literally: a host with glibc 2.28 also runs what was built for an older one
    tags = [*(f"_2_{minor}" for minor in range(int(glibc.removeprefix("2.")), 4, -1)), "2014", "2010", "1"]
    binary = [f"{name}=={version}" for name, version in missing.items() if name not in SOURCE_ONLY]
    if binary:
        command = [
            *(*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation=cp"),
            *(f"--python-version={python}", *(f"--platform=manylinux{tag}_x86_64" for tag in tags)),
            *("--dest", wheels, *binary),
        ]
        run(command, "a wheel cannot be downloaded")
    for name in SOURCE_ONLY.keys() & missing.keys():
        command = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, f"{name}=={missing[name]}"]
        run(command, f"{name} cannot be built", SOURCE_ONLY[name])
        if not list(wheels.glob(f"{name}-*-py3-none-any.whl")):
            fail(f"the wheel of {name} is not pure Python")


def check_complete(missing: dict[str, str], wheels: Path) -> None:
    """Exit unless the folder has one wheel of each package."""
    found = sorted(normalize(file.name.split("-")[0]) for file in wheels.iterdir())
    if found != sorted(missing):
        fail(f"expected wheels of {', '.join(sorted(missing))}, found {', '.join(found)}")


def drop_files(wheels: Path, pattern: str) -> None:
    """Rewrite the wheels, and their lists of files, without the files that match."""
    num_dropped = 0
    for wheel in sorted(wheels.iterdir()):
        with zipfile.ZipFile(wheel) as source:
            dropped = set(fnmatch.filter(source.namelist(), pattern))
            if not dropped:
                continue
            num_dropped += len(dropped)
            unfinished = wheel.with_suffix(".unfinished")
            with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as target:
                for info in source.infolist():
                    if info.filename in dropped:
                        continue
                    content = source.read(info)
                    if info.filename.endswith(".dist-info/RECORD"):
                        lines = content.decode().splitlines(keepends=True)
                        content = "".join(
                            line for line in lines if line.split(",")[0] not in dropped
                        ).encode()
                    target.writestr(info, content)
        unfinished.rename(wheel)
    if not num_dropped:
        fail(f"--drop {pattern}: no collected wheel has such a file")


def run(command: Sequence[object], fault: str, variables: dict[str, str] | None = None) -> None:
    """Run a program; exit with its error and the fault if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **(variables or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stdout + done.stderr, end="", file=sys.stderr)
        fail(fault)


if __name__ == "__main__":
    main()
