"""All data and 1,000 steps with the first block seen; fewer documents in training."""

from dataclasses import replace

from call2_card0 import FIRST
from call3_card0 import ALL
from experiments import BLOCK_MODE, Evaluation, block, full
from prompts import PromptOptions

FULL_MODE = {"full": Evaluation(mode="full")}
FEWER = PromptOptions(min_documents=4)

QUEUE = [
    block("first-block-all", "documents see the tokens before them, all data", **FIRST, **ALL),
    block("fewer-documents", "4 to 10 documents, drawn from 20", prompt_options=FEWER),
    replace(
        full("full-fewer-documents", "full fine-tuned, 4 to 10 documents", prompt_options=FEWER),
        evaluations=FULL_MODE,
    ),
    block(
        "both-all-seed1",
        "block fine-tuned, both modes, all data, second seed",
        evaluations=BLOCK_MODE,
        seed=1,
        **ALL,
    ),
    block("first-block-seed1", "first-block-equal, second seed", evaluations=BLOCK_MODE, seed=1, **FIRST),
]
