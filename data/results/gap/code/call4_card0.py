"""All data: a higher learning rate, and twice the steps."""

from dataclasses import replace

from call3_card0 import ALL
from call3_card1 import FULL_MODE
from experiments import block, full

TWICE = {"data_share": 1.0, "steps": 2000}

QUEUE = [
    block("both-rate-5e-4", "both modes, learning rate 5e-4", learning_rate=5e-4, **ALL),
    replace(
        full("full-rate-5e-4", "full, learning rate 5e-4", learning_rate=5e-4, **ALL), evaluations=FULL_MODE
    ),
    block("both-2000", "both modes, 2,000 steps", **TWICE),
    replace(full("full-2000", "full, 2,000 steps", **TWICE), evaluations=FULL_MODE),
]
