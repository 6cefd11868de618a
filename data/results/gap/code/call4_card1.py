"""All data: several questions in a prompt, and more to read."""

from dataclasses import replace

from call3_card0 import ALL
from call3_card1 import FULL_MODE
from experiments import block, full
from prompts import Sharing

SHARED = {"sharing": Sharing(num_questions=8), **ALL}
MORE = {"sharing": Sharing(num_questions=8, num_clozes=4, by_lot=0.5), "more_data": True, **ALL}

QUEUE = [
    block(
        "both-more", "both modes, 8 questions and 4 clozes a prompt, reading tasks, documents by lot", **MORE
    ),
    replace(full("full-more", "full, trained as both-more", **MORE), evaluations=FULL_MODE),
    block("both-shared", "both modes, 8 questions a prompt", **SHARED),
    replace(full("full-shared", "full, 8 questions a prompt", **SHARED), evaluations=FULL_MODE),
    block(
        "dual-shared", "8 questions a prompt, each in both modes", modes="dual", **{**SHARED, "steps": 500}
    ),
]
