"""More to read, with a lower learning rate."""

from dataclasses import replace

from call3_card1 import FULL_MODE
from call4_card1 import MORE
from experiments import block, full

QUEUE = [
    block("both-more-1e-4", "as both-more, learning rate 1e-4", learning_rate=1e-4, **MORE),
    replace(
        full("full-more-1e-4", "as full-more, learning rate 1e-4", learning_rate=1e-4, **MORE),
        evaluations=FULL_MODE,
    ),
]
