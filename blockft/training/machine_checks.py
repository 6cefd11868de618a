"""Check this machine before a run: packages, GPUs, compiler, folders, memory that processes share."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from blockft.errors import UserError
from blockft.inputs import existing_parent, find_home
from blockft.printable import print_text
from blockft.training.distributed import use_cpu
from blockft.training.library_internals import SHARED_MEMORY
from blockft.training.preflight import MAX_CLOCK_SKEW_S, Check
from blockft.units import format_bytes, format_count, format_memory

MIN_FREE_BYTES = 2**30
"""Free bytes that a folder of outputs or caches should have."""

MIN_SHARED_BYTES = 2**29
"""Size that shared memory should have; containers have 64 MB unless they are told otherwise."""

USED_SHARE = 0.1
"""Another process that holds this share of a GPU's memory is reported."""

COMPILE_S = 100
"""Time limit of compiling DeepSpeed's operator."""


def build_machine_checks(output_dirs: list[Path]) -> list[Check]:
    """Return the checks of this machine; `output_dirs` are the folders that commands will write."""
    caches = {
        "HF_HOME": "~/.cache/huggingface",
        "TORCH_EXTENSIONS_DIR": "~/.cache/torch_extensions",
        "TRITON_CACHE_DIR": "~/.triton",
        "TORCHINDUCTOR_CACHE_DIR": tempfile.gettempdir(),
    }
    return [
        Check(name="packages", run=check_packages),
        Check(name="GPUs", run=_check_gpus, seconds=30),
        Check(name="GPU memory", run=_check_gpu_memory, needs=["GPUs"], seconds=30),
        Check(name="communication", run=_check_backend, needs=["GPUs"]),
        Check(name="compiler", run=check_compiler),
        Check(name="DeepSpeed operator", run=_check_operator, needs=["compiler"], seconds=COMPILE_S + 5),
        *(
            Check(name=f"folder {path}", run=partial(check_folder, path, MIN_FREE_BYTES))
            for path in output_dirs
        ),
        *(
            Check(name=f"cache {name}", run=partial(_check_cache, name, default))
            for name, default in caches.items()
        ),
        Check(name="shared memory", run=partial(check_shared_memory, SHARED_MEMORY)),
        Check(name="clock", run=partial(_check_clock, output_dirs[0] if output_dirs else Path())),
    ]


def check_packages() -> str:
    """Return the versions of the packages that blockft requires.

    Raises:
        UserError: a package is missing or has a version out of the range that blockft allows.
    """
    try:
        requirements = [Requirement(text) for text in requires("blockft") or []]
    except PackageNotFoundError as error:
        raise UserError("blockft is not installed in this Python: pip install blockft") from error
    found = []
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError as error:
            raise UserError(f"{requirement.name} is missing: pip install '{requirement}'") from error
        if not requirement.specifier.contains(installed, prereleases=True):
            raise UserError(
                f"{requirement.name} is {installed}, blockft needs {requirement.specifier}: "
                f"pip install '{requirement}'"
            )
        if requirement.name in ("torch", "transformers", "deepspeed"):
            found.append(f"{requirement.name} {installed}")
    return f"Python {sys.version.split()[0]}, {', '.join(found)}; {len(requirements)} requirements are met"


def _check_gpus() -> str:
    has_driver = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    if not use_cpu():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        num_gpus = format_count(torch.cuda.device_count(), "GPU")
        return f"{num_gpus} ({', '.join(sorted(names))}), CUDA {torch.version.cuda}"
    if not has_driver:
        return "no GPU: training runs on the CPU"
    if torch.version.cuda is None:
        raise UserError(
            f"this machine has a GPU, but torch {torch.__version__} is built without CUDA: install a torch "
            "for CUDA (pytorch.org)"
        )
    raise UserError(
        f"torch {torch.__version__} sees no GPU, although a driver is installed: check nvidia-smi, "
        f"CUDA_VISIBLE_DEVICES, and that the driver is new enough for CUDA {torch.version.cuda}"
    )


def _check_gpu_memory() -> str:
    if use_cpu():
        return "no GPU"
    free = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
    for index, (free_bytes, total_bytes) in enumerate(free):
        if total_bytes - free_bytes > USED_SHARE * total_bytes:
            raise UserError(
                f"GPU {index} has {format_memory(free_bytes)} of {format_memory(total_bytes)} free: end the "
                "process that uses it (nvidia-smi), or choose others with CUDA_VISIBLE_DEVICES"
            )
    return f"{format_memory(min(bytes_free for bytes_free, _ in free))} are free on every GPU"


def _check_backend() -> str:
    if use_cpu():
        if not dist.is_gloo_available():
            raise UserError("this torch has no Gloo: install a torch with torch.distributed")
        return "Gloo"
    if not dist.is_nccl_available():
        raise UserError("this torch has no NCCL: install the torch for Linux and CUDA (pytorch.org)")
    return f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"


def check_compiler() -> str:
    """Return the compiler and the build tool with which DeepSpeed builds its operators.

    Raises:
        UserError: one of them is missing.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    compiler = os.environ.get("CXX", "g++")
    for program, remedy in ((compiler, "apt-get install g++"), ("ninja", "pip install ninja")):
        if not shutil.which(program, path=path):
            raise UserError(f"{program}, which DeepSpeed needs to compile, is not on PATH: {remedy}")
    return f"{compiler} and ninja"


def _check_operator() -> str:
    if not use_cpu():
        return "none is needed on a GPU, unless the optimizer is offloaded"
    code = (
        "from blockft.training.distributed import set_worker_environment; set_worker_environment();"
        "from blockft.training.compiler_lock import watch_compiler_locks; watch_compiler_locks();"
        "from blockft.training.library_internals import compile_cpu_operator; compile_cpu_operator()"
    )
    # another process, because it can be ended when it waits for a compiler's lock
    return run_compiler([sys.executable, "-c", code])


def run_compiler(command: list[str]) -> str:
    """Run a command that compiles DeepSpeed's operator, and print its remarks as soon as they come.

    Raises:
        UserError: it fails or takes too long.
    """
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        timer = threading.Timer(COMPILE_S, process.kill)
        timer.start()
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.strip())
            if line.startswith("blockft: "):
                print_text(line.rstrip(), file=sys.stderr, flush=True)
        process.wait()
        timer.cancel()
    if process.returncode == -signal.SIGKILL:
        remark = next((line.removeprefix("blockft: ") for line in lines if "waiting for" in line), "")
        raise UserError(f"DeepSpeed's operator was not compiled within {COMPILE_S} s; {remark}")
    if process.returncode:
        last = next((line for line in reversed(lines) if line), "no message")
        raise UserError(f"DeepSpeed's operator cannot be compiled ({last}): check g++ and the torch headers")
    return "compiled"


def _check_cache(variable: str, default: str) -> str:
    """Check a folder of caches, which an environment variable names."""
    path = os.environ.get(variable, default)
    if path.startswith("~/") and find_home() is None:
        raise UserError(f"this user has no home folder: set HOME, or {variable} to a folder")
    return check_folder(Path(path).expanduser(), MIN_FREE_BYTES)


def check_folder(folder: Path, min_bytes: int) -> str:
    """Check that a folder, or the folder in which it will be created, can be written and has space.

    Raises:
        UserError: it cannot be written, or its disk has fewer free bytes.
    """
    existing = existing_parent(folder)
    if not existing.is_dir():
        raise UserError(f"{existing} is no folder: choose another place for {folder}")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"blockft")
    except OSError as error:
        raise UserError(f"{existing} cannot be written: {error.strerror}") from error
    free = shutil.disk_usage(existing).free
    if free < min_bytes:
        raise UserError(
            f"{existing} has {format_bytes(free)} of free space, less than {format_bytes(min_bytes)}: free "
            f"some space, or choose another place for {folder}"
        )
    return f"{format_bytes(free)} are free"


def check_shared_memory(folder: Path) -> str:
    """Check the size of the file system for memory that processes share.

    Raises:
        UserError: it is missing or small.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: mount shared memory (tmpfs) there")
    size = shutil.disk_usage(folder).total
    if size < MIN_SHARED_BYTES:
        raise UserError(
            f"{folder} has only {format_memory(size)}: start the container with --shm-size=8g or --ipc=host"
        )
    return f"{folder} has {format_memory(size)}"


def _check_clock(folder: Path) -> str:
    existing = existing_parent(folder)
    with tempfile.NamedTemporaryFile(dir=existing) as file:
        skew_s = abs(time.time() - os.stat(file.name).st_mtime)
    if skew_s > MAX_CLOCK_SKEW_S:
        raise UserError(
            f"the clock differs by {skew_s:.0f} s from that of the file server of {existing}: synchronize "
            "the clocks (chrony, ntp)"
        )
    return time.strftime("%Y-%m-%d %H:%M:%S %Z")
