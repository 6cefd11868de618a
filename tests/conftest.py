"""Settings of the tests: environment variables, set before torch is imported, and profiles of hypothesis."""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# parallel test workers share the cores, and sums in one order make losses equal to the last bit
os.environ.setdefault("OMP_NUM_THREADS", "1")

# continuous integration runs the same examples each time, so that a failure can be reproduced
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
