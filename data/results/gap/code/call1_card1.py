"""A second full fine-tuned model, which teaches; curriculum and losses on other tokens."""

from experiments import block, full
from objectives import Objective

QUEUE = [
    full("full-seed1", "full fine-tuned, second seed", seed=1, keep_weights=True),
    block("distill", "teacher's answers, weight 0.5", teacher="full-seed1", objective=Objective(distill=0.5)),
    block("curriculum", "40 % of the steps in full mode, then block mode alone", modes="full-then-block"),
    block(
        "hidden",
        "teacher's states in the final block",
        teacher="full-seed1",
        objective=Objective(hidden_weight=1.0),
    ),
    block("document-lm", "loss of documents' tokens, 0.1", objective=Objective(document_weight=0.1)),
    block("question-lm", "loss of questions' tokens, 0.2", objective=Objective(question_weight=0.2)),
    block("merged-documents", "documents joined at random, ever less", modes="both", join=1.0),
    block("both-seed1", "block fine-tuned, both modes, second seed", seed=1),
]
