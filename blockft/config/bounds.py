"""Upper bounds of settings and options: far above real runs, and below what exhausts time or memory.

Imports nothing, so that the command line starts fast.
"""

MAX_TOKENS = 1 << 24
"""Tokens of a row, a prompt or an answer."""

MAX_BATCH = 1 << 16
"""Rows, prompts or questions that belong to one batch."""

MAX_BLOCKS = 1 << 16
"""Blocks or documents of a prompt."""

MAX_EPOCHS = 10_000
"""Passes over the training data, whose rows are planned before the first step."""

MAX_COPIES = 10_000
"""Passes of `prepare` over the sources."""

MAX_COUNT = 10**9
"""Steps, samples, examples or checkpoints."""

MAX_PROCESSES = 1 << 10
"""Processes of one machine."""

MAX_CONCURRENCY = 512
"""Questions that an endpoint answers at the same time."""

MAX_RUNS = 1_000_000
"""Runs of a benchmark."""

MAX_RUN_SEED = (1 << 32) - 1
"""Seed of a run, which numpy takes as 32 bits."""

MAX_SEED = (1 << 63) - 1
"""Seed that is a signed number of 64 bits."""

MAX_PORT = 65535
"""Port of TCP."""

MAX_FLOAT = 1e9
"""Decays and norms. A learning rate has no bound: a run stops when its loss is not finite."""

MAX_PAGE_SAMPLES = 1_000
"""Samples of the page of `inspect`."""

MAX_CORPUS = 100_000
"""Documents of the corpus of `bench serve`, which are in memory."""

MAX_ZIPF = 5.0
"""Exponent of Zipf's law. With a larger one no document but the first is drawn."""

MAX_RATE = 10_000.0
"""Requests per second."""

MAX_BISECTIONS = 20
"""Bisections of a search. A range is 2 ** (1 / 2 ** 20) wide after 20 of them."""

MAX_SERVE_SECONDS = 86_400.0
"""Seconds of a measurement of a server."""
