"""Settings of the process that runs the tests, made before torch and transformers are imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# parallel test workers share the cores, and sums in one order make losses equal to the last bit
os.environ.setdefault("OMP_NUM_THREADS", "1")
