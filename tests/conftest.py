"""Settings of the tests: variables (before torch is imported), hypothesis, seeds, and tests of GPUs."""

import os
import random
import sys

import pytest
from hypothesis import HealthCheck, settings

from blockft import digest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# parallel test workers share the cores, and sums in one order make losses equal to the last bit
os.environ.setdefault("OMP_NUM_THREADS", "1")
# counting GPUs then leaves CUDA uninitialised, as it must be in a process from which ranks are forked
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# a machine may be slow for a while: the first verification that takes a second would be reported on stderr
digest._REPORTED_S = 3600
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")
# continuous integration runs the same examples each time, so that a failure can be reproduced
settings.register_profile("ci", settings(), derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

NUM_GPUS = {"gpu": 1, "gpu2": 2}
"""How many GPUs a test needs, by its marker."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Set seeds, and skip a test if this machine has too few GPUs for it, before its fixtures are made."""
    # random numbers then do not depend on the tests that ran before in this process
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    needed = max(
        (NUM_GPUS[marker.name] for marker in item.iter_markers() if marker.name in NUM_GPUS), default=0
    )
    if not needed:
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < needed:
        pytest.skip(f"needs {needed} GPU{'s' * (needed > 1)}, and this machine has {found}")
