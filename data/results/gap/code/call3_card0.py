"""All data and 1,000 steps: baselines and recomputation; a second seed of the plain recipe in screening."""

from experiments import BLOCK_MODE, Evaluation, Experiment, block, full
from prompts import PromptOptions

ALL = {"data_share": 1.0, "steps": 1000}

QUEUE = [
    full("full-all", "full fine-tuned, all data", **ALL),
    block("both-all", "block fine-tuned, both modes, all data", keep_weights=True, **ALL),
    Experiment(
        name="recomputation",
        description="both-all, context tokens computed once more",
        training=None,
        weights="both-all",
        evaluations={
            f"{choice} {100 * share:.0f} %": Evaluation(
                mode="block", prompt_options=PromptOptions(), recomputed=share, choice=choice
            )
            for share in (0.05, 0.1, 0.2)
            for choice in ("first", "changed")
        },
    ),
    block("both-seed1", "block fine-tuned, both modes, second seed", evaluations=BLOCK_MODE, seed=1),
]
