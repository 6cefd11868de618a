"""The import of bitsandbytes through blockft loads no code of the Hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAKE = """
from pathlib import Path
def get_kernel(*_, **__):
    Path(__file__).with_name("asked").touch()
    raise OSError
"""


def test_bitsandbytes_asks_for_no_kernel_of_the_hub(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE)
    code = (
        "import blockft, bitsandbytes, sys\n"
        "assert 'bitsandbytes.backends.cpu.ops' in sys.modules and 'kernels' not in sys.modules\n"
        "import kernels\n"
        "assert kernels.get_kernel"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (package / "asked").exists()
