"""Other attention inside documents, other shares of the modes, other losses."""

from experiments import BLOCK_MODE, block
from objectives import Objective
from prompts import PromptOptions

QUEUE = [
    block(
        "bidirectional",
        "documents' tokens see their whole block",
        prompt_options=PromptOptions(is_bidirectional=True),
    ),
    block(
        "document-lm-0.5",
        "loss of documents 0.5",
        evaluations=BLOCK_MODE,
        objective=Objective(document_weight=0.5),
    ),
    block("block-25", "a quarter of the draws in block mode", modes="some-block", share=0.25),
    block("block-75", "three quarters in block mode", evaluations=BLOCK_MODE, modes="some-block", share=0.75),
    block(
        "fewer-documents",
        "4 to 10 documents",
        evaluations=BLOCK_MODE,
        prompt_options=PromptOptions(min_documents=4),
    ),
    block(
        "self-distill",
        "own full mode teaches, 0.5",
        evaluations=BLOCK_MODE,
        objective=Objective(distill=0.5, teacher="self"),
    ),
    block(
        "mask-loss-weights",
        "weights of answers that the mask harms",
        evaluations=BLOCK_MODE,
        objective=Objective(raised_weight=1.0, teacher="self"),
    ),
]
