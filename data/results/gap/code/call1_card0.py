"""Baselines, then changes of the mask and of the loss."""

from experiments import Evaluation, Experiment, block, full
from objectives import Objective
from prompts import PromptOptions

QUEUE = [
    full("full", "full fine-tuned", keep_weights=True),
    block("both", "block fine-tuned, both modes", keep_weights=True),
    block(
        "first-block", "documents see the tokens before them", prompt_options=PromptOptions(private_prefix=-1)
    ),
    block("ranking", "ranking loss 0.2", objective=Objective(ranking_weight=0.2)),
    block("block-only", "block fine-tuned, block mode alone", modes="block"),
    full("full-ranking", "full fine-tuned, ranking loss 0.2", objective=Objective(ranking_weight=0.2)),
    block("question-twice", "the question twice", prompt_options=PromptOptions(question_twice=True)),
    Experiment(
        name="untrained-baselines",
        description="the full fine-tuned model, without block fine-tuning",
        training=None,
        weights="full",
        evaluations={
            "no re-encoding": Evaluation(mode="block", prompt_options=PromptOptions(reencoded=False)),
            "first tokens shared": Evaluation(mode="block", prompt_options=PromptOptions(private_prefix=4)),
            "first block shared": Evaluation(mode="block", prompt_options=PromptOptions(private_prefix=-1)),
            "first tokens hidden": Evaluation(mode="block", prompt_options=PromptOptions(hidden_first=2)),
        },
    ),
]
