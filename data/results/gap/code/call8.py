"""Fourth round: the ranking loss with more seeds, for block mode and for the baseline, at 1e-4 on all data.

Each model is read once, and twice if time is left: a second reading of the three documents that are read
most, after a first reading in place, and after one in which all documents end right before the question.
"""

from dataclasses import replace

from call2_card0 import FIRST
from call3_card1 import FULL_MODE
from call7 import LOW, OPTIONS, asked, with_seed
from experiments import Evaluation, block, full
from objectives import Objective
from prompts import PromptOptions

RANKING = Objective(ranking_weight=0.2, ranking_layers=(21, 22, 23))


def best_three(mode: str, options: PromptOptions) -> dict[str, Evaluation]:
    return {f"{mode}, best 3": Evaluation(mode=mode, prompt_options=options, best=3)}


QUEUE = []
for seed in (0, 1, 2):
    own = with_seed("first-block-ranking-1e-4", seed)
    words = "documents see the tokens before them"
    settings = {**FIRST, **LOW, "seed": seed}
    QUEUE.append(
        block(
            own,
            f"{words}, ranking loss 0.2 in layers 21 to 23, seed {seed}",
            keep_weights=True,
            objective=RANKING,
            **settings,
        )
    )
    QUEUE.append(asked(f"{own}-best-3", f"{own}, a second reading", own, best_three("block", OPTIONS)))
    near = {
        name: replace(evaluation, first_stride=0) for name, evaluation in best_three("block", OPTIONS).items()
    }
    QUEUE.append(asked(f"{own}-near-first", f"{own}, first reading without places", own, near))
    QUEUE.append(
        block(
            with_seed("first-block-75-1e-4", seed),
            f"{words}, three quarters of the draws in block mode, seed {seed}",
            keep_weights=True,
            **{**settings, "modes": "some-block", "share": 0.75, "extra_len": 12_288},
        )
    )
    own = with_seed("full-ranking-1e-4", seed)
    baseline = full(
        own,
        f"full, ranking loss 0.2 in layers 21 to 23, seed {seed}",
        keep_weights=True,
        objective=RANKING,
        **LOW,
        seed=seed,
    )
    QUEUE.append(replace(baseline, evaluations=FULL_MODE))
    evaluations = best_three("full", PromptOptions())
    QUEUE.append(asked(f"{own}-best-3", f"{own}, a second reading", own, evaluations))
assert len({e.name for e in QUEUE}) == len(QUEUE)
