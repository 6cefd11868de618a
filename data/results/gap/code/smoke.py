"""Compiles what the other queues need and tries each kind of loss."""

from experiments import block
from objectives import Objective

QUEUE = [
    block("both", "", keep_weights=True),
    block(
        "all",
        "",
        teacher="both",
        objective=Objective(
            distill=0.5, hidden_weight=1.0, ranking_weight=0.2, raised_weight=1.0, question_weight=0.1
        ),
    ),
]
