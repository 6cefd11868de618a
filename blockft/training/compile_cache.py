"""The folder in which compiled layers are kept between runs."""

import os
from pathlib import Path

from blockft.errors import warn
from blockft.training.library_internals import default_inductor_cache

INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable with PyTorch's folder of compiled code, in which it also keeps that of Triton."""


def use_compile_cache() -> None:
    """Let PyTorch keep compiled code in `blockft/inductor` under XDG_CACHE_HOME; call it before compiling.

    A folder that the user's variable names is used instead. PyTorch's own folder is in /tmp, which often ends
    with the job. Ranks and runs share the folder: PyTorch writes each file under another name and renames it,
    and finds it by a hash of the code, the options and the GPU.
    """
    # an import of PyTorch's compiler sets the variable to its default
    if os.environ.get(INDUCTOR_CACHE) not in (None, "", default_inductor_cache()):
        return
    # without a home, as in a container whose user has no name, "~" stays and nothing is kept
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache) / "blockft" / "inductor"
    try:
        if cache.startswith("~"):
            raise OSError("the user has no home folder")
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK | os.X_OK)
        reason = "permission denied"
    except OSError as error:
        is_writable, reason = False, error.strerror or str(error)
    if is_writable:
        os.environ[INDUCTOR_CACHE] = str(folder)
    else:
        warn(
            f"compiled layers are not kept for later runs, because {folder} cannot be written ({reason}): "
            f"set {INDUCTOR_CACHE} or XDG_CACHE_HOME to another folder"
        )
