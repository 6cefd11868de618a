"""All data: lower learning rates."""

from dataclasses import replace

from call3_card0 import ALL
from call3_card1 import FULL_MODE
from experiments import block, full

QUEUE = [
    block("both-rate-1e-4", "both modes, learning rate 1e-4", learning_rate=1e-4, **ALL),
    replace(
        full("full-rate-1e-4", "full, learning rate 1e-4", learning_rate=1e-4, **ALL), evaluations=FULL_MODE
    ),
]
