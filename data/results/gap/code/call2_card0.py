"""Changes of what documents see and of what stands between them."""

from experiments import BLOCK_MODE, block
from objectives import Objective
from prompts import PromptOptions

FIRST = {"prompt_options": PromptOptions(private_prefix=-1), "extra_len": 9216}

QUEUE = [
    block("first-block-equal", "documents see the tokens before them, equal questions a step", **FIRST),
    block("links", "4 link tokens", evaluations=BLOCK_MODE, prompt_options=PromptOptions(link_tokens=4)),
    block(
        "end-tokens",
        "4 tokens at the end of each document",
        evaluations=BLOCK_MODE,
        prompt_options=PromptOptions(end_tokens=4),
    ),
    block(
        "first-block-lm",
        "the first, and loss of documents 0.1",
        objective=Objective(document_weight=0.1),
        **FIRST,
    ),
    block("sinks", "2 sink tokens", evaluations=BLOCK_MODE, prompt_options=PromptOptions(sink_tokens=2)),
    block(
        "first-block-question-twice",
        "the first, and the question twice",
        prompt_options=PromptOptions(private_prefix=-1, question_twice=True),
        extra_len=9216,
    ),
    block("both-seed1", "block fine-tuned, both modes, second seed", seed=1),
]
