"""The Triton kernels compute what their references compute, in Triton's interpreter and without a GPU.

TRITON_INTERPRET is read when a kernel is imported, so the tests of the kernels run in a process of their own.
The interpreter shows wrong numbers. It does not show what the compiler or a GPU refuses.
"""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from tests.commands import ROOT

TIMEOUT_S = 1200


def version(name: str) -> tuple[int, ...]:
    """Return the first two numbers of the version of an installed package; none if it is not installed."""
    try:
        return tuple(map(int, importlib.metadata.version(name).split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return ()


def run_in_interpreter(*arguments: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


pytestmark = [
    pytest.mark.slow,  # the interpreter takes minutes
    pytest.mark.skipif(not version("triton"), reason="Triton is not installed, as in PyTorch for CPUs"),
]


def test_the_page_writer_writes_what_the_reference_writes() -> None:
    run_in_interpreter("tests/serving/test_page_writer.py")


@pytest.mark.skipif(
    version("triton") < (3, 7) and version("numpy") >= (2, 4),
    reason="the interpreter of Triton 3.6 needs NumPy 2.3 for loops",
)
def test_attention_over_cached_blocks_is_that_of_the_reference() -> None:
    """One query per prompt, as in decoding: more queries take the interpreter minutes."""
    run_in_interpreter("tests/attention/test_triton_launch.py", "-k", "1-torch or columns or refused")
