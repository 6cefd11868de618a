"""The folder in which compiled layers are kept between runs."""

import os
from pathlib import Path

from blockft.errors import warn

INDUCTOR_CACHE, TRITON_CACHE = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
"""Environment variables of PyTorch and Triton. A user's values stay."""


def use_compile_cache() -> None:
    """Let PyTorch and Triton keep compiled code in `blockft` under XDG_CACHE_HOME; call it before compiling.

    PyTorch itself uses a folder in /tmp, which often ends with the job. Ranks and runs share the folder: the
    libraries write each file under another name and rename it, and find it by a hash of the code, the options
    and the GPU.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "blockft"
    for name, subfolder in ((INDUCTOR_CACHE, "inductor"), (TRITON_CACHE, "triton")):
        if os.environ.get(name):
            continue
        try:
            (folder / subfolder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            warn(
                f"compiled layers are not kept for later runs: {folder / subfolder} cannot be written "
                f"({error.strerror}); set {name} to a folder"
            )
            continue
        os.environ[name] = str(folder / subfolder)
